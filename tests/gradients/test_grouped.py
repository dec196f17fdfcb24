"""Batches and grouped queries by vmap: heads that share keys share what is computed from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.instruments.counting import count_operations
from lora_limits.problem import replaced
from tests.support.masked_problems import abstract, having
from tests.support.tools import assert_close, quick_jit

GROUP = 3
OWN = ("weights.query", "adapters.query", "target")


def grouped(p):
    """(the problems of the heads, one problem that holds the keys of all once)."""
    rng = np.random.default_rng(3)

    def other(head):
        def changed(x):
            return x + 0.1 * head * rng.normal(size=x.shape)

        weights = ll.AttentionWeights(changed(p.weights.query), p.weights.key, p.weights.value)
        query = jax.tree.map(changed, p.adapters["query"])
        return replaced(
            p,
            weights=weights,
            adapters=p.adapters | {"query": query},
            target=changed(p.target),
        )

    heads = [other(h) for h in range(GROUP)]
    axes = ll.batch_axes(p, *OWN)
    stacked = jax.tree.map(
        lambda axis, *x: x[0] if axis is None else np.stack(x),
        axes,
        *heads,
        is_leaf=lambda x: x is None,
    )
    return heads, stacked, axes


@pytest.mark.parametrize("method", [ll.Exact(5), ll.Polynomial(2, block_size=4)])
def test_a_group_equals_its_heads_and_shared_adapters_get_the_sum(method):
    p = having("causal", "rotations")
    heads, stacked, axes = grouped(p)
    run = quick_jit(jax.vmap(lambda p: ll.gradient(p, method).gradient, in_axes=(axes,)))
    got = run(stacked)
    one = quick_jit(lambda p: ll.gradient(p, method).gradient)
    each = [one(h) for h in heads]
    for i, want in enumerate(each):
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), want, 1e-12)

    def total(key):
        adapters = stacked.adapters | {"key": key}

        def head(p):
            return ll.loss(p)

        return jax.vmap(head, in_axes=(axes,))(replaced(stacked, adapters=adapters)).sum()

    if isinstance(method, ll.Exact):
        want = quick_jit(jax.grad(total))(jax.tree.map(jnp.asarray, p.adapters["key"]))
        assert_close({"key": jax.tree.map(lambda x: x.sum(0), got["key"])}, {"key": want}, 1e-12)


N, D_MODEL, D = 1024, 16, 8


def counted(method, shared):
    """Operations of GROUP heads, their keys shared or each with a copy of its own."""
    p = abstract(N, causal=True)
    axes = ll.batch_axes(p, *OWN) if shared else ll.batch_axes(p)
    stacked = jax.tree.map(
        lambda axis, x: x if axis is None else jax.ShapeDtypeStruct((GROUP, *x.shape), x.dtype),
        axes,
        p,
        is_leaf=lambda x: x is None,
    )
    run = jax.vmap(lambda p: ll.gradient(p, method).gradient, in_axes=(axes,))
    return count_operations(run, stacked)["flops"]


# X_K W_K and X_V W_V, and the adapters of both, of two columns
PROJECTED = 2 * N * (2 * D_MODEL * D + 2 * 2 * (D_MODEL + D))


def test_what_is_projected_from_shared_keys_is_projected_once():
    saved = counted(ll.Exact(128), False) - counted(ll.Exact(128), True)
    assert saved >= (GROUP - 1) * PROJECTED


def test_uncentred_sums_over_shared_keys_are_made_once():
    """M is built in the forward and again in the backward, each 2 L k (1 + d_value) operations."""
    method = ll.Polynomial(2, centred=False, block_size=128)
    saved = counted(method, False) - counted(method, True)
    features = 45
    assert saved >= (GROUP - 1) * (PROJECTED + 2 * 2 * N * features * (1 + D))


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"batch_axes: got \['weights.output'\]"):
        ll.batch_axes(problems.make(0), "weights.output")
