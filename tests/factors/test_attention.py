"""Attention by a factor or a block tree: exact where nothing is left out, near it where keys are far,
refused where it is causal.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import minilm
from lora_limits.problem import projections
from tests.support import dense_attention


def test_attention_by_a_factor_wide_enough_is_exact():
    """Grouped heads and masked keys, with the derivative in all three inputs.

    A query whose key is masked is padding, as there are as many queries as keys.
    """
    holes = dense_attention.HOLES
    there = holes[:, :, None, None]
    *arrays, cotangent = dense_attention.inputs(3, value_width=dense_attention.H)
    asked = (*arrays, np.where(there, cotangent, 0), holes)
    out, gradients = dense_attention.compiled(None, False, dense_attention.peer)(*asked)
    got = dense_attention.compiled(ll.SparseLowRank(50, 3))(*asked)
    dense_attention.assert_near(got, (np.where(there, out, 0), gradients), 2e-5)


def test_attention_whose_keys_are_all_near_is_exact():
    """Grouped heads and masked tokens, with the derivative in all three inputs."""
    *inputs, cotangent = dense_attention.inputs(3, value_width=dense_attention.V + 1)
    # queries taken for padding get 0
    there = dense_attention.HOLES[:, :, None, None]
    inputs.append(cotangent * there)
    want = dense_attention.compiled(None, False, dense_attention.peer)(
        *inputs, dense_attention.HOLES
    )
    got = dense_attention.compiled(ll.BlockTree())(*inputs, dense_attention.HOLES)
    assert not np.asarray(got[0])[~dense_attention.HOLES].any()
    dense_attention.assert_near(got, (np.asarray(want[0]) * there, want[1]), 1e-6)


def test_attention_with_far_and_masked_keys_is_near_the_exact_one():
    p = minilm.problem(5, 4, length=300, noise=1.0, dtype="float64")
    rng = np.random.default_rng(0)
    inputs = [np.asarray(x)[None, :, None] for x in projections(p)]
    there = rng.uniform(size=(1, 300)) < 0.8
    # queries taken for padding get 0
    real = there[:, :, None, None]
    cotangent = rng.normal(size=inputs[0].shape) * real
    out, back = dense_attention.compiled(ll.BlockTree(64, 64))(*inputs, cotangent, there, p.beta)
    true, true_back = dense_attention.compiled(ll.Exact())(*inputs, cotangent, there, p.beta)
    for got, want in zip((out, *back), (np.asarray(true) * real, *true_back), strict=True):
        off = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-6 < off < 0.2
    assert not np.asarray(back[1])[:, ~there[0]].any()


@pytest.mark.parametrize("method", [ll.Skeleton(2), ll.BlockTree()], ids=lambda m: type(m).__name__)
def test_causal_attention_is_refused(method):
    q = jnp.ones((1, 4, 1, 2))
    with pytest.raises(
        ValueError, match=f"method of causal attention: got {type(method).__name__}"
    ):
        ll.attention(q, q, q, method=method, is_causal=True)
