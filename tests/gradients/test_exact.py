"""Exact gradients: dense and tiled against the definitions, automatic differentiation and finite
differences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.gradients import exact
from tests.support import problems, reference
from tests.support.tools import arrays, assert_close, later, quick_jit

EXACT = quick_jit(ll.gradient, static_argnums=1)
LOSS = quick_jit(ll.loss)


def definition(problem):
    loss, grads = reference.loss_and_gradient(problem)
    return loss, {n: ll.Adapter(*pair) for n, pair in grads.items()}


def with_adapters(p, adapters):
    return ll.LoRAProblem(
        p.x_query,
        p.x_key,
        p.x_value,
        p.target,
        weights=p.weights,
        adapters=adapters,
        scale=p.scale,
        beta=p.beta,
    )


@pytest.mark.parametrize(
    ("shape", "adapt"),
    [*(("cross", a) for a in problems.SUBSETS), *later(*(("self", a) for a in problems.SUBSETS))],
)
def test_dense_and_tiled_equal_the_definitions(adapt, shape):
    p = problems.make(1, shape=problems.SHAPES[shape], adapt=adapt, reach=3.0)
    loss, want = definition(p)
    for method in (ll.Exact(), ll.Exact(block_size=5)):
        got = EXACT(p, method)
        assert got.bound is None
        assert got.rank is None
        np.testing.assert_allclose(got.loss, loss, rtol=1e-13)
        assert_close(got.gradient, want, 1e-13)
    np.testing.assert_allclose(LOSS(p), loss, rtol=1e-13)


@pytest.mark.parametrize("kind", problems.KINDS)
@pytest.mark.parametrize("reach", [0.3, 40.0])
def test_dense_and_tiled_equal_the_definitions_on_degenerate_inputs(kind, reach):
    p = problems.make(2, kind=kind, reach=reach)
    loss, want = definition(p)
    # scores of 1e6 cost six digits wherever they are formed
    tolerance = 1e-8 if kind == "vast biases" else 1e-11
    top = max(1e-300, *(np.abs(x).max() for x in arrays(want).values()))
    for method in (ll.Exact(), ll.Exact(block_size=5)):
        got = EXACT(p, method)
        np.testing.assert_allclose(got.loss, loss, rtol=1e-11, atol=1e-20)
        assert_close(got.gradient, want, tolerance, scale=top + 1e-14)


@pytest.mark.parametrize("shape", ["smallest", "one key", "one query"])
def test_dense_and_tiled_equal_the_definitions_on_smallest_shapes(shape):
    p = problems.make(3, shape=problems.SHAPES[shape])
    loss, want = definition(p)
    for method in (ll.Exact(), ll.Exact(block_size=2)):
        got = EXACT(p, method)
        np.testing.assert_allclose(got.loss, loss, rtol=1e-13)
        assert_close(got.gradient, want, 1e-13, scale=1.0)
    if shape == "one key":  # softmax of one score is constant
        assert np.abs(arrays(want)["query.a"]).max() < 1e-15


@pytest.mark.parametrize("block_size", [1, 4, 13, 100])
def test_the_block_changes_only_rounding(block_size):
    p = problems.make(4, reach=5.0)
    assert_close(
        EXACT(p, ll.Exact(block_size=block_size)).gradient, EXACT(p, ll.Exact()).gradient, 1e-13
    )


def test_the_gradient_is_the_derivative_of_the_loss():
    """jax.grad of `loss` in all six arrays, and central differences of the definition along random
    directions.
    """
    p = problems.make(5, shape=problems.CROSS, reach=2.0)

    def loss_of(adapters):
        return ll.loss(with_adapters(p, adapters))

    got = EXACT(p, ll.Exact()).gradient
    assert_close(got, quick_jit(jax.grad(loss_of))(jax.tree.map(jnp.asarray, p.adapters)), 1e-12)
    rng = np.random.default_rng(6)
    for _ in range(8):
        step = jax.tree.map(lambda v: 1e-5 * rng.normal(size=v.shape), p.adapters)
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(lambda v, s, sign=sign: v + sign * s, p.adapters, step)
            ends.append(reference.loss_and_gradient(with_adapters(p, moved))[0])
        slope = sum(
            np.sum(np.asarray(g) * s)
            for g, s in zip(jax.tree.leaves(got), jax.tree.leaves(step), strict=True)
        )
        np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=1e-6, atol=1e-9)


def test_dense_terms_obey_the_identities_of_the_paper():
    """Definitions 3.2 to 3.6: rows of f sum to 1, rho = <f, q> = <c, f V>, p = p1 - p2 = f o (q -
    rho), p 1 = 0.
    """
    p = problems.make(7, shape=problems.CROSS, reach=3.0)
    t = {n: np.asarray(v) for n, v in exact.dense_terms(p).items()}
    s = reference.scores(p)
    np.testing.assert_allclose(t["f"], np.exp(s) / np.exp(s).sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(t["q"], (t["f"] @ t["V"] - p.target) @ t["V"].T, rtol=1e-12)
    np.testing.assert_allclose(t["rho"], (t["f"] * t["q"]).sum(1), rtol=1e-11)
    np.testing.assert_allclose(t["p1"], t["f"] * t["q"], rtol=1e-12)
    np.testing.assert_allclose(t["p2"], np.diag(t["rho"]) @ t["f"], rtol=1e-12)
    np.testing.assert_allclose(t["p"], t["p1"] - t["p2"], rtol=1e-12)
    np.testing.assert_allclose(t["p"].sum(1), 0, atol=1e-14)


@pytest.mark.parametrize("method", [ll.Exact(), ll.Exact(block_size=5)])
def test_dtype_follows_the_inputs_and_float32_is_close(method):
    p = problems.make(8, dtype=np.float32)
    got = EXACT(p, method)
    assert {np.asarray(x).dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert_close(got.gradient, definition(p)[1], 3e-6)


def test_scores_far_beyond_overflow_stay_finite():
    p = problems.make(9, reach=1e5)
    _, want = definition(p)
    for method in (ll.Exact(), ll.Exact(block_size=5)):
        got = EXACT(p, method).gradient
        assert all(np.isfinite(x).all() for x in arrays(got).values())
        assert_close(got, want, 1e-9, scale=1.0)
