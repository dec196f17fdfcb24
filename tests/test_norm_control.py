"""What the experiments crossing and outlier_free stand on: the problems they make, and what bounds
a norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_limits as ll
from experiments.problems import causal_heads
from experiments.training import bases, watching
from lora_limits.instruments.counting import count_operations
from lora_limits.ledger import conditions, corrections
from lora_limits.nn import per_layer
from lora_limits.nn.lora import LoRA, LoRAAttention
from lora_limits.nn.transformer import Shape, Transformer
from lora_limits.problem import project
from tests.support.tools import quick_jit

FULL = LoRA(rank=2, alpha=3.0, adapt=("query", "key", "value"))


def layer(seed=0, **options):
    """A float64 layer of two heads of width 8, its parameters all away from zero."""
    graphdef, params = nnx.split(
        LoRAAttention(10, 2, 8, FULL, method=ll.Exact(), rngs=nnx.Rngs(seed), **options)
    )
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, float) + 0.2 * rng.normal(size=x.shape)), params
        ),
    )


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("normalised", [False, True])
def test_the_residual_watched_in_training_is_as_large_as_the_output(normalised):
    """And the heads' scores and values are the layer's own: its output less the target is the
    cotangent, scaled.
    """
    module, x, cotangent = layer(normalised=normalised), normal(7, 10), normal(7, 2, 8, seed=2)
    make = watching.normalised_problem if normalised else watching.adapted_problem
    problem = quick_jit(lambda x, c: make(module, x, c))(x, cotangent)
    out = module.attend(x[None], ll.Exact())[0].transpose(1, 0, 2)
    np.testing.assert_allclose(
        quick_jit(jax.vmap(ll.loss))(problem), (out**2).sum((1, 2)) / 2, rtol=1e-10
    )
    c, wanted = out - problem.target, cotangent.transpose(1, 0, 2)
    np.testing.assert_allclose(c / c[:, :1, :1], wanted / wanted[:, :1, :1], rtol=1e-9)


def test_query_key_normalisation_bounds_the_scores_whatever_the_adapters_and_layer_norm_does_not():
    evidence = conditions.norm_control()
    assert evidence.holds, evidence.measured
    module, x = layer(normalised=True), normal(1, 9, 10)
    for name in ("query", "key"):
        projection = getattr(module, name)
        projection.b[...] = 1e3 * projection.b[...]
    q, k, _ = module.rows(x)
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(8)
    assert 1 < jnp.abs(scores).max() <= np.sqrt(8) * (1 + 1e-12)


def test_other_norms_are_those_of_a_copy():
    model = Transformer(
        Shape(8, 0, 4, d_model=8, heads=2, width=4, layers=1), FULL, rngs=nnx.Rngs(0)
    )
    before = jax.tree.map(np.asarray, nnx.state(model))
    copy = bases.with_scaled_scores(model, 4.0)
    kept, changed = (jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(m))) for m in (model, copy))
    assert all(np.array_equal(a, b) for a, b in zip(kept, jax.tree.leaves(before), strict=True))
    assert sum(not np.array_equal(a, b) for a, b in zip(kept, changed, strict=True)) == 2


@pytest.mark.parametrize("softmax_1", [False, True])
def test_a_block_of_a_causal_head_has_the_gradients_of_the_model_in_turned_coordinates(softmax_1):
    """dl/dA as it is, dl/dB turned with its norm kept, against the block written out."""
    module, x, cotangent = (
        layer(is_causal=True, softmax_1=softmax_1),
        normal(12, 10),
        normal(12, 2, 8, seed=2),
    )
    problem = jax.tree.map(lambda z: z[1], quick_jit(lambda x: per_layer.problem_of(module, x))(x))
    turned = causal_heads.block_problem(problem, np.asarray(cotangent[:, 1]))
    assert turned.x_key.shape[0] == 7
    assert bool((problem.x_key[0] == 0).all()) == softmax_1
    rows = {
        "x_query": problem.x_query[6:],
        "x_key": problem.x_key[:7],
        "x_value": problem.x_value[:7],
    }
    plain = dataclasses.replace(problem, **rows, target=problem.target[6:])
    q, k, v = (
        project(plain, name, getattr(plain, f"x_{name}")) for name in ("query", "key", "value")
    )
    out = jax.nn.softmax(plain.beta * q @ k.T) @ v
    c = cotangent[6:, 1]
    plain = dataclasses.replace(plain, target=out - c * jnp.linalg.norm(out) / jnp.linalg.norm(c))
    run = quick_jit(lambda p: ll.gradient(p, ll.Exact()).gradient)
    got, want = run(turned), run(plain)
    for name, adapter in want.items():
        scale = float(jnp.abs(adapter.a).max())
        np.testing.assert_allclose(got[name].a, adapter.a, atol=1e-4 * scale)
        np.testing.assert_allclose(
            jnp.linalg.norm(got[name].b), jnp.linalg.norm(adapter.b), rtol=1e-4
        )


def test_exact_gradients_are_one_program_and_as_many_operations_whatever_the_norms():
    """Appendix G: so no norm can shorten them; softmax_1 adds one key."""
    assert corrections.timed_exact_attention().holds
    tame, wild = (
        ll.random_problem(jax.random.key(0), length=32, width=4, rank=2, gamma=g)
        for g in (0.1, 10.0)
    )
    counts = [
        count_operations(lambda p: ll.gradient(p, ll.Exact()).gradient, p)["flops"]
        for p in (tame, wild)
    ]
    assert counts[0] == counts[1] > 0
