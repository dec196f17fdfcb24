"""Exact gradients: dense and tiled against the definitions, automatic differentiation and finite
differences.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.gradients import exact
from lora_limits.instruments.counting import count_operations
from tests.support import reference
from tests.support.tools import arrays, assert_close, later, quick_jit

EXACT = quick_jit(ll.gradient, static_argnums=1)
LOSS = quick_jit(ll.loss)


def definition(problem):
    loss, grads = reference.loss_and_gradient(problem)
    return loss, {n: ll.Adapter(*pair) for n, pair in grads.items()}


def scaled(p, factor):
    """The same problem with `factor` times its scores."""
    return dataclasses.replace(p, beta=np.asarray(factor * p.beta, p.x_query.dtype))


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


# ------------------------------------------------------------------------------------------------------- tiles

LONG = problems.Shape(lq=40, lk=50, inputs=(3, 5, 4), width=2, value_width=3, rank=1)


def flops(p, block_size):
    return count_operations(lambda p: exact.tiled_gradient(p, block_size), p)["flops"]


def test_scores_are_computed_once_where_a_tile_takes_all_keys_and_those_of_the_last_tile_always():
    once, pairs = flops(problems.make(10, shape=LONG), 64), 2 * LONG.lq * LONG.lk
    # S, p K, p^T Q; e V, V g, e^T g
    products = pairs * 3 * (LONG.width + LONG.value_width)
    assert products < once < 1.2 * products
    # 7 tiles of 8 keys, of which the last has 2
    assert flops(problems.make(10, shape=LONG), 8) - once == 2 * LONG.lq * 48 * LONG.width


@pytest.mark.parametrize("adapt", problems.SUBSETS)
def test_only_what_the_adapters_ask_for_is_computed(adapt):
    """Of a pair: p K, p^T Q and e^T g each for its adapter, V g for p; projections and adapters cost a query less."""
    d, d_value = LONG.width, LONG.value_width
    some, all_ = (flops(problems.make(11, shape=LONG, adapt=a), 64) for a in (adapt, problems.FULL))
    missing = (
        d * ("query" not in adapt) + d * ("key" not in adapt) + d_value * ("value" not in adapt)
    )
    missing += d_value * (adapt == ("value",))
    pairs = 2 * LONG.lq * LONG.lk
    assert pairs * missing <= all_ - some < pairs * (missing + 1.2)


@pytest.mark.parametrize(("block_size", "largest"), [(8, 50 * 5), (20, 400), (64, 40 * 50)])
def test_no_array_is_larger_than_a_tile_or_the_rows(block_size, largest):
    p = problems.make(12, shape=LONG)
    assert count_operations(lambda p: exact.tiled_gradient(p, block_size), p)["largest"] <= largest
    assert count_operations(lambda p: exact.tiled_loss(p, block_size), p)["largest"] <= largest


@pytest.mark.parametrize("adapt", [("query",), ("key", "value")])
@pytest.mark.parametrize("block_size", [8, 20, 64])
def test_square_tiles_a_few_wide_ones_and_a_single_one(block_size, adapt):
    """20: three tiles of at most 17 keys for the query adapter alone."""
    p = problems.make(15, shape=LONG, adapt=adapt)
    loss, want = definition(p)
    got = EXACT(p, ll.Exact(block_size=block_size))
    np.testing.assert_allclose(got.loss, loss, rtol=1e-13)
    np.testing.assert_allclose(
        quick_jit(exact.tiled_loss, static_argnums=1)(p, block_size), loss, rtol=1e-13
    )
    assert_close(got.gradient, want, 1e-13)


@pytest.mark.parametrize("block_size", [7, 64])
def test_small_and_large_scores_side_by_side(block_size):
    """A batch in which some problems need the maximum of their scores and some do not."""
    p = problems.make(13, shape=LONG)
    batch = [scaled(p, factor) for factor in (1e-3, 1.0, 30.0, 1e3, 1e6)]
    method = ll.Exact(block_size=block_size)
    stacked = jax.tree.map(lambda *x: np.stack(x), *batch)
    got = quick_jit(jax.vmap(lambda p: ll.gradient(p, method)))(stacked)
    for i, one in enumerate(batch):
        loss, want = definition(one)
        tolerance = max(1e-13, 1e-15 * np.abs(reference.scores(one)).max())
        np.testing.assert_allclose(got.loss[i], loss, rtol=10 * tolerance)
        assert_close(jax.tree.map(lambda x, i=i: x[i], got.gradient), want, 10 * tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [21.0, 23.0, 176.0, 178.0, 1e4])
def test_scores_that_are_all_alike_neither_overflow_nor_underflow(size, sign, dtype):
    """On either side of the bound below which no maximum is taken, 22.2 and 177.4, and far beyond it."""
    x = np.ones((6, 1), dtype)
    v = np.arange(6, dtype=dtype)[:, None]
    weights = ll.AttentionWeights(*(np.eye(1, dtype=dtype) for _ in range(3)))
    adapters = {
        n: ll.Adapter(np.ones((1, 1), dtype), np.zeros((1, 1), dtype)) for n in problems.FULL
    }
    p = ll.LoRAProblem(
        sign * x, x, v, 0 * x, weights=weights, adapters=adapters, scale=dtype(1), beta=dtype(size)
    )
    for block_size in (4, 6):
        got = EXACT(p, ll.Exact(block_size=block_size))
        np.testing.assert_allclose(got.loss, 0.5 * 6 * 2.5**2, rtol=1e-6)
        # every f_ij is 1/6, so dl/dB_V = sum_j v_j sum_i f_ij c_i = 15 * 2.5
        np.testing.assert_allclose(got.gradient["value"].b, 15 * 2.5, rtol=1e-6)
        np.testing.assert_allclose(got.gradient["query"].b, 0, atol=1e-5 * size)


def test_tiled_float32_is_close_to_the_definition():
    p = problems.make(14, shape=problems.Shape(lq=300, lk=400), dtype=np.float32)
    _, want = reference.loss_and_gradient(p)
    want = {n: ll.Adapter(*pair) for n, pair in want.items()}
    for block_size in (64, 160, 400):
        assert_close(EXACT(p, ll.Exact(block_size=block_size)).gradient, want, 1e-6)
