"""The sampled error estimate: unbiased, its intervals as good as they say, and never a matrix of
rows by keys.
"""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.contenders import degrees
from experiments.problems import conditioned as problems
from lora_limits.coordinates import frame as frames
from lora_limits.estimate import intervals, rows
from tests.support import reference
from tests.support.compiled import BLOCK, GRADIENT, polynomial
from tests.support.tools import arrays, assert_close, quick_jit

TAYLOR = np.array([1, 1, 1 / 2, 1 / 6])
ANY = np.array([1.02, 0.95, 0.52, 0.15])  # no series: exact at no score
KEYS = 300
FRAME = quick_jit(frames.of_problem, static_argnums=(1, 2))


@quick_jit
def every_row(p, frame, c):
    index = jnp.arange(p.x_query.shape[0])
    return rows.row_errors(p, frame, rows.polynomial_kernel(c), index, BLOCK)


@functools.partial(quick_jit, static_argnums=(3, 4))
def estimates(p, frame, c, rows, block):
    def one(key):
        return intervals.error_estimate(p, frame, c, rows=rows, key=key, block=block)

    return jax.vmap(one)(jax.random.split(jax.random.key(0), KEYS))


def sampled(p, c, rows=64, block=BLOCK):
    """{"query.a": Estimate, ...}, NumPy arrays with a leading axis of KEYS."""
    got = estimates(p, FRAME(p, block, True), c, rows, block)
    assert {x.dtype for x in jax.tree.leaves(got)} == {p.x_query.dtype}
    return {
        f"{n}.{h}": jax.tree.map(lambda x: np.asarray(x, np.float64), getattr(a, h))
        for n, a in got.items()
        for h in ("a", "b")
    }


def folded(p):
    """W* + s B A, by name."""
    w = {n: np.asarray(getattr(p.weights, n), np.float64) for n in problems.FULL}
    return {
        n: w[n] + p.scale * p.adapters[n].b @ p.adapters[n].a if n in p.adapters else w[n]
        for n in w
    }


def dense(p, factor, kernel, centred=True):
    """Gradients with rows w factor(s) / D, and w kernel(s) / D where the softmax is differentiated,
    in NumPy.
    """
    w = folded(p)
    x_query, x_key, x_value, target = (
        np.asarray(x, np.float64) for x in (p.x_query, p.x_key, p.x_value, p.target)
    )
    q, v = x_query @ w["query"], x_value @ w["value"]
    nu = q.mean(0) * centred
    log_weights = p.beta * x_key @ w["key"] @ nu
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    centre = weights @ x_key
    k, q = (x_key - centre[None] * centred) @ w["key"], q - nu[None]
    s = p.beta * q @ k.T
    total = (weights[None] * factor(s)).sum(1, keepdims=True)
    f, prime = (weights[None] * g(s) / total for g in (factor, kernel))
    c = f @ v - target
    inner = c @ v.T - (c * (f @ v)).sum(1, keepdims=True)
    dk = p.beta * ((prime * inner).T @ q + (f * inner).sum(0)[:, None] * nu[None])
    dw = {
        "query": x_query.T @ (p.beta * (prime * inner) @ k),
        "key": (x_key - centre[None]).T @ dk,
        "value": x_value.T @ (f.T @ c),
    }
    return {
        n: ll.Adapter(p.scale * a.b.T @ dw[n], p.scale * dw[n] @ a.a.T)
        for n, a in p.adapters.items()
    }


def approximate(p, c, centred=True):
    p_of = np.polynomial.Polynomial(c)
    return dense(p, p_of, p_of.deriv(), centred)


def true_error(p, c, centred=True):
    return jax.tree.map(np.subtract, dense(p, np.exp, np.exp, centred), approximate(p, c, centred))


def largest(gradient):
    return max(np.abs(x).max() for x in arrays(gradient).values())


def test_the_dense_oracle_is_the_exact_gradient_and_that_of_a_series():
    p = problems.make(1, shape=problems.CROSS, reach=1.5)
    exact = {n: ll.Adapter(*pair) for n, pair in reference.loss_and_gradient(p)[1].items()}
    assert_close(dense(p, np.exp, np.exp), exact, 1e-12)
    assert_close(approximate(p, ANY), quick_jit(degrees.series_gradient)(p, ANY)[0], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("centred", [True, False])
def test_the_dense_oracle_is_the_fast_gradient(centred):
    p = problems.make(1, shape=problems.CROSS, reach=1.5)
    assert_close(
        approximate(p, TAYLOR, centred), GRADIENT(p, polynomial(3, centred=centred)).gradient, 1e-12
    )


def total(terms):
    return {
        n: ll.Adapter(*(np.einsum("tmi,tmj->ij", *t) for t in (a.a, a.b))) for n, a in terms.items()
    }


@pytest.mark.parametrize(
    ("shape", "centred"),
    [("cross", True), ("self", False), ("one key", True), ("one query", False)],
)
@pytest.mark.parametrize("c", [TAYLOR, ANY], ids=["taylor", "any"])
def test_the_rows_add_up_to_the_error(shape, centred, c):
    """All rows at once: the expectation of the estimate, sum_i pi_i (E_i / pi_i), without
    chance.
    """
    p = problems.make(1, shape=problems.SHAPES[shape], reach=1.5)
    got = total(every_row(p, FRAME(p, BLOCK, centred), c))
    assert_close(got, true_error(p, c, centred), 1e-13, scale=1 + largest(dense(p, np.exp, np.exp)))


@pytest.mark.parametrize("adapt", problems.SUBSETS[:-1], ids="+".join)
def test_any_adapters_may_be_missing(adapt):
    """The others folded into the weights: the same scores, the same frame, the same errors."""
    p = problems.make(1, shape=problems.CROSS, reach=1.5)
    w = {n: getattr(p.weights, n) if n in adapt else x for n, x in folded(p).items()}
    part = dataclasses.replace(
        p, weights=ll.AttentionWeights(**w), adapters={n: p.adapters[n] for n in adapt}
    )
    got = total(every_row(part, FRAME(p, BLOCK, True), ANY))
    want = true_error(p, ANY)
    assert_close(got, {n: want[n] for n in adapt}, 1e-12)


def check(got, want):
    """Unbiased to 4.5 of its own deviations; the share of intervals, at 95 %, that hold, per
    array.
    """
    for name, e in got.items():
        gap, deviation = np.abs(e.error.mean(0) - want[name]), e.error.std(0) / KEYS**0.5
        assert (gap <= 4.5 * deviation).all(), f"{name}: biased"
        entries = (np.abs(e.error - want[name][None]) <= e.half_width).mean()
        assert 0.9 <= entries < 1, f"{name}: entries {entries}"
        size = np.abs(want[name]).max()
        assert ((e.low <= size) & (size <= e.high)).mean() >= 0.93, f"{name}: max norm"


@pytest.mark.parametrize(
    "kind", ["gaussian", "clustered", "outlier tokens", "hidden direction", "far value"]
)
def test_unbiased_and_covered(kind):
    p = problems.make(3, shape=problems.CROSS, kind=kind, reach=1.5)
    got, want = sampled(p, TAYLOR), arrays(true_error(p, TAYLOR))
    check(got, want)
    for name, e in got.items() if kind == "gaussian" else ():
        size = np.abs(want[name]).max()
        assert 0.3 * size < np.median(e.low) < np.median(e.high) < 2 * size


def test_unbiased_and_covered_in_float32_at_512_tokens():
    """Strong attention, 32 rows of 512: few enough that Student's quantile matters."""
    p = ll.random_problem(
        jax.random.key(1), length=512, width=2, rank=2, gamma=2.0, adapt=problems.FULL
    )
    p = jax.tree.map(lambda x: np.asarray(x, np.float32), p)
    check(sampled(p, TAYLOR.astype(np.float32), 32, 512), arrays(true_error(p, TAYLOR)))


def test_equal_rows_have_no_variance_and_no_nan():
    """Every X_s is the error itself: what is left of the interval is the rounding of the sample
    variance.
    """
    p = problems.make(3, shape=problems.CROSS, reach=1.5)
    p = dataclasses.replace(
        p, x_query=np.tile(p.x_query[:1], (11, 1)), target=np.tile(p.target[:1], (11, 1))
    )
    want = arrays(true_error(p, ANY))
    for name, e in sampled(p, ANY).items():
        size = np.abs(want[name]).max()
        assert all(np.isfinite(x).all() for x in e)
        # all scores are 0, where this polynomial is wrong in its derivative alone: errors in the
        # query adapter alone
        assert (size > 1e-3) == name.startswith("query")
        assert (np.abs(e.error - want[name][None]) <= e.half_width + 1e-14).all()
        assert (e.high - e.low <= 1e-6 * size + 1e-13).all()


def test_fresh_adapters_have_no_error_where_they_have_no_gradient():
    p = problems.make(3, shape=problems.CROSS, kind="zero adapters", reach=1.5)
    want = arrays(true_error(p, TAYLOR))
    for name, e in sampled(p, TAYLOR).items():
        assert all(np.isfinite(x).all() for x in e)
        assert (np.abs(want[name]).max() == 0) == (e.high.max() == 0)


def test_one_token_and_two_rows():
    """One query: every sample is the error, and the quantile of one degree of freedom, 12.7, is
    finite.
    """
    p = problems.make(3, shape=problems.SMALLEST, adapt=("query",))
    want = arrays(true_error(p, ANY))
    for name, e in sampled(p, ANY, 2).items():
        np.testing.assert_allclose(
            e.error, np.broadcast_to(want[name][None], e.error.shape), atol=1e-14
        )
        assert all(np.isfinite(x).all() for x in e)


def sizes(jaxpr):
    """Sizes of all intermediate arrays, those of inner loops too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from sizes(inner)


def test_no_array_of_rows_by_keys():
    """64 rows and 8192 keys in blocks of 512: nothing larger than a block, or than what comes
    in.
    """
    p = problems.make(0, shape=problems.Shape(lq=500, lk=8192))

    def run(p):
        frame = frames.of_problem(p)
        return intervals.error_estimate(
            p, frame, jnp.asarray(TAYLOR), rows=64, key=jax.random.key(0)
        )

    assert max(sizes(jax.make_jaxpr(run)(p).jaxpr)) <= 64 * 512


def test_a_gradient_carries_its_estimate_when_asked():
    p = ll.random_problem(jax.random.key(1), length=64, width=2, rank=1, gamma=1.5)
    method, key = ll.Polynomial(3, block_size=BLOCK), jax.random.key(2)
    result = quick_jit(functools.partial(ll.gradient, method=method, rows=32))(p, key=key)
    want = quick_jit(functools.partial(intervals.error_estimate, rows=32, block=BLOCK))(
        p, FRAME(p, BLOCK, True), jnp.asarray(TAYLOR), key=key
    )
    assert result.estimate is not None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14), result.estimate, want
    )
    exact = GRADIENT(p, ll.Exact()).gradient
    for name, pair in result.estimate.items():
        for half in ("a", "b"):
            error = np.abs(getattr(exact[name], half) - getattr(result.gradient[name], half)).max()
            assert getattr(pair, half).low <= error <= getattr(pair, half).high
    assert ll.gradient(p, ll.Exact()).estimate is None


def test_estimates_that_cannot_be_had_are_refused():
    p = ll.random_problem(jax.random.key(1), length=8, width=2, rank=1, gamma=1.0)
    with pytest.raises(ValueError, match="expected both or neither"):
        ll.gradient(p, ll.Polynomial(1), rows=4)
    with pytest.raises(ValueError, match="expected a method whose error is estimated"):
        ll.gradient(p, ll.Exact(), rows=4, key=jax.random.key(0))
