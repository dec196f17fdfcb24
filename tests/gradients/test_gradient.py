"""The verb: the polynomial gradient against automatic differentiation of the forward it claims to
derive.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.gradients import fitting, key_summary, plan
from tests.support import reference
from tests.support.compiled import (
    BATCH,
    BLOCK,
    GRADIENT,
    UNBOUNDED,
    UNCERTIFIED,
    batched,
    polynomial,
)
from tests.support.tools import arrays, assert_close, later, quick_jit


def exact(problem):
    return {n: ll.Adapter(*pair) for n, pair in reference.loss_and_gradient(problem)[1].items()}


def worst(got, want):
    got, want = arrays(got), arrays(want)
    top = max(np.abs(x).max() for x in want.values())
    return max(np.abs(got[n] - want[n]).max() for n in want) / top


def factored_loss(problem, adapters, c, centred):
    """1/2 |f~ V - Y|^2 with f~ = w P(s) / D written out, dense; centres constant."""

    def weight(name, of):
        w = getattr(problem.weights, name)
        return w + problem.scale * of[name].b @ of[name].a if name in of else w

    q = problem.x_query @ weight("query", adapters)
    v = problem.x_value @ weight("value", adapters)
    fixed = problem.adapters
    x_key = problem.x_key
    nu = (problem.x_query @ weight("query", fixed)).mean(0) if centred else np.zeros(q.shape[1])
    log_w = problem.beta * x_key @ (weight("key", fixed) @ nu)
    shares = jax.nn.softmax(log_w)
    # mu is the projection of a constant mean input, so it moves with the key adapter
    centre = shares @ x_key if centred else jnp.zeros(x_key.shape[1])
    k = (x_key - centre[None]) @ weight("key", adapters)
    w = jnp.exp(problem.beta * k @ nu)
    s = problem.beta * (q - nu[None]) @ k.T
    p = w[None] * sum(c[n] * s**n for n in range(len(c)))
    out = p @ v / p.sum(1, keepdims=True)
    return 0.5 * ((out - problem.target) ** 2).sum()


FACTORED = jax.jit(jax.value_and_grad(factored_loss, argnums=1), static_argnums=3)


def coefficients(problem, m):
    """The polynomial that the library chose."""
    if m.series == "taylor":
        return np.array([1 / math.factorial(n) for n in range(m.degree + 1)])

    def run(p):
        made = plan.make(p, m)
        return fitting.setup(made, key_summary.summarise(made).moments).c

    return np.asarray(quick_jit(run)(problem))


CASES = [
    ("cross", problems.FULL, polynomial(3)),
    ("cross", ("query",), polynomial(3)),
    ("self", problems.FULL, polynomial(3, "chebyshev")),
    ("self", problems.PARTIAL, polynomial(2, centred=False)),
    *later(*(("cross", adapt, polynomial(3)) for adapt in problems.SUBSETS[1:-1])),
    *later(
        ("self", problems.FULL, polynomial(3)), ("self", problems.FULL, polynomial(2, "fitted"))
    ),
]


@pytest.mark.parametrize(("shape", "adapt", "m"), CASES)
def test_polynomial_is_the_derivative_of_the_factored_forward(shape, adapt, m):
    p = problems.make(
        1, shape=problems.SHAPES[shape], adapt=adapt, reach=1.5, kind="self attention"
    )
    loss, want = FACTORED(p, jax.tree.map(jnp.asarray, p.adapters), coefficients(p, m), m.centred)
    got = UNBOUNDED(p, m)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-12)
    assert_close(got.gradient, want, 1e-10)
    assert set(got.bound) == set(adapt)
    assert got.rank == math.comb(p.weights.query.shape[1] + m.degree, m.degree)
    assert 0 < float(got.normaliser) <= 2


@pytest.mark.parametrize(("degrees", "factor"), later(((1, 3), 6), ((3, 6), 120)))
def test_the_error_falls_with_the_degree_as_fast_as_the_series(degrees, factor):
    """Degree g leaves about R^g / g! of the gradient: at R = 1, 6 from degree 1 to 3 and 120 from 3
    to 6, at least.
    """
    many = [problems.make(seed, reach=1.0) for seed in range(BATCH)]
    errors = []
    for degree in degrees:
        batch = batched("taylor", degree)(problems.stack(many)).gradient
        each = [
            worst(jax.tree.map(lambda v, i=i: v[i], batch), exact(p))
            for i, p in enumerate(many[:6])
        ]
        errors.append(np.median(each))
    assert errors[0] > factor * errors[1]
    assert errors[1] < {3: 0.02, 6: 1e-4}[degrees[1]]


def shifted(problem, query, key):
    """The problem with one more input column, of ones, whose weights add `query` and `key` to every
    Q and K.
    """
    width = problem.weights.query.shape[1]
    extra = {
        "query": np.full(width, query),
        "key": np.full(width, key),
        "value": np.zeros(problem.target.shape[1]),
    }

    def wider(x):
        return np.concatenate([x, np.ones_like(x[:, :1])], 1)

    weights = {
        n: np.concatenate([getattr(problem.weights, n), v[None].astype(problem.dtype)])
        for n, v in extra.items()
    }
    adapters = {
        n: ll.Adapter(a.a, np.concatenate([a.b, np.zeros_like(a.b[:1])]))
        for n, a in problem.adapters.items()
    }
    return ll.LoRAProblem(
        *(wider(getattr(problem, f"x_{n}")) for n in problems.FULL),
        problem.target,
        weights=ll.AttentionWeights(**weights),
        adapters=adapters,
        scale=problem.scale,
        beta=problem.beta,
    )


def test_a_common_key_changes_nothing():
    """K - 1 mu^T: exactly the same polynomial gradient, however large mu is; uncentred it would be
    worthless.
    """
    p = problems.make(2, reach=1.0)
    plain, moved = (
        GRADIENT(shifted(p, 0.0, 0.0), polynomial(3)),
        GRADIENT(shifted(p, 0.0, 40.0), polynomial(3)),
    )
    assert_close(moved.gradient, plain.gradient, 1e-10)
    np.testing.assert_allclose(moved.loss, plain.loss, rtol=1e-11)
    for name, bound in arrays(plain.bound).items():
        np.testing.assert_allclose(arrays(moved.bound)[name], bound, rtol=1e-6)


def test_a_common_query_reweights_the_keys_and_is_otherwise_centred_away():
    """Q + 1 nu^T is other attention (nu re-weights the keys), as well approximated as before;
    uncentred it is not.
    """
    plain = problems.make(2, reach=0.5)
    p = shifted(plain, 6.0, 3.0)
    want = exact(p)
    assert worst(exact(shifted(plain, 0.0, 3.0)), want) > 0.1
    centred, raw = UNCERTIFIED(p, polynomial(3)), UNCERTIFIED(p, polynomial(3, centred=False))
    assert worst(centred.gradient, want) < 2e-3
    assert worst(raw.gradient, want) > 100 * worst(centred.gradient, want)


@pytest.mark.slow
def test_the_block_changes_only_rounding():
    p = problems.make(3)
    assert_close(
        GRADIENT(p, ll.Polynomial(3, block_size=64)).gradient,
        GRADIENT(p, polynomial(3)).gradient,
        1e-12,
    )


@pytest.mark.parametrize(
    "shape",
    ["one query", *(pytest.param(s, marks=pytest.mark.slow) for s in ("one key", "smallest"))],
)
def test_smallest_shapes(shape):
    """One key: softmax is 1 whatever the scores, so query and key gradients vanish and the value's
    is exact.
    """
    p = problems.make(4, shape=problems.SHAPES[shape])
    got, want = UNCERTIFIED(p, polynomial(3)), exact(p)
    # one query is its own centre: every score is then a weight, and the polynomial is exact
    assert_close(
        got.gradient, want, 1e-12, scale=1 + max(np.abs(x).max() for x in arrays(want).values())
    )


def test_vmap_over_a_batch_equals_a_loop():
    many = [problems.make(seed) for seed in range(BATCH)]
    batch = batched("taylor", 3)(problems.stack(many))
    for i, p in enumerate(many[:5]):
        one = GRADIENT(p, polynomial(3))
        assert_close(jax.tree.map(lambda v, i=i: v[i], batch.gradient), one.gradient, 1e-12)
        np.testing.assert_allclose(batch.loss[i], one.loss, rtol=1e-13)
        for name, bound in arrays(one.bound).items():
            np.testing.assert_allclose(arrays(batch.bound)[name][i], bound, rtol=1e-6)


def test_float32_is_float32_throughout_and_close():
    p = problems.make(5, dtype=np.float32)
    got = GRADIENT(p, polynomial(3))
    assert {v.dtype for v in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert 1e-9 < worst(got.gradient, GRADIENT(problems.make(5), polynomial(3)).gradient) < 1e-4


def test_new_numbers_do_not_recompile():
    run = jax.jit(lambda p, m: ll.gradient(p, m).loss, static_argnums=1)
    for seed in range(3):
        run(problems.make(seed, reach=0.5 + seed), ll.Exact())
        run(problems.make(seed), ll.Exact(block_size=None))
    assert run._cache_size() == 1
    before = GRADIENT._cache_size()
    GRADIENT(problems.make(6), polynomial(3))
    middle = GRADIENT._cache_size()
    GRADIENT(problems.make(7, reach=0.1, size=9.0), ll.Polynomial(degree=3, block_size=BLOCK))
    assert middle - before <= 1
    assert GRADIENT._cache_size() == middle


def test_a_normaliser_that_is_not_positive_is_reported_and_not_clipped():
    """One key in twenty scores -9.5, the others 0.5: 1 + s + s^2/2 + s^3/6 averages to -4.6 for the
    first query.
    """
    n = 20
    keys = np.where(np.arange(n) == 0, -9.5, 0.5)[:, None]
    queries = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)[:, None]
    rng = np.random.default_rng(8)
    one = np.ones((1, 1))
    p = ll.LoRAProblem(
        queries,
        keys,
        keys,
        rng.normal(size=(n, 1)),
        weights=ll.AttentionWeights(one, one, one),
        adapters={m: ll.Adapter(0 * one, one) for m in problems.FULL},
        scale=1.0,
        beta=1.0,
    )
    scores = reference.scores(p)
    sums = sum(scores**g / math.factorial(g) for g in range(4)).mean(1)
    assert sums[0] < -1 < 1 < sums[1]
    got = GRADIENT(p, polynomial(3))
    np.testing.assert_allclose(got.normaliser, sums.min(), rtol=1e-9)
    assert all(np.isinf(b) for b in arrays(got.bound).values())
    # still the derivative of the forward as it stands, negative normaliser and all
    loss, want = FACTORED(
        p, jax.tree.map(jnp.asarray, p.adapters), coefficients(p, polynomial(3)), True
    )
    np.testing.assert_allclose(got.loss, loss, rtol=1e-11)
    assert_close(got.gradient, want, 1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ll.Polynomial(-1), "degree: got -1"),
        (lambda: ll.Polynomial(2.0), "degree: got 2.0"),
        (lambda: ll.Polynomial(True), "degree: got True"),
        (lambda: ll.Polynomial(2, "minimax"), "series: got 'minimax'"),
        (lambda: ll.Polynomial(2, block_size=0), "block_size: got 0"),
        (lambda: ll.Exact(block_size=0), "block_size: got 0"),
        (lambda: ll.gradient(problems.make(0), "exact"), "method: got 'exact'"),
    ],
)
def test_what_is_wrong_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_are_frozen_hashable_and_compare_by_value():
    assert hash(ll.Polynomial(2)) == hash(ll.Polynomial(2, "taylor"))
    assert ll.Polynomial(2) != ll.Polynomial(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ll.Exact().block_size = 3
