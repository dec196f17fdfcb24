"""The paper's chain: each lemma against its bound, the gradient against the exact one and against
the fast route.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.coordinates import frame as frames
from lora_limits.gradients import chain, chain_bounds, exact
from lora_limits.polynomial import needed
from lora_limits.problem import projections, pull_back, scalars
from tests.support.compiled import UNCERTIFIED
from tests.support.tools import arrays, assert_close, later, quick_jit

RUN = quick_jit(ll.gradient, static_argnums=1)
GRADIENT = quick_jit(chain.chain_gradient)
ERRORS = quick_jit(chain_bounds.chain_errors)
FACTOR = quick_jit(chain.polynomial_factor, static_argnums=(1, 2))
NORMS = quick_jit(ll.norm_report)
DENSE = quick_jit(exact.dense_gradient)
LEMMAS = ("f", "c", "q", "p1", "p2", "p")


def svd_factor(problem, rank):
    u, s, vt = np.linalg.svd(np.asarray(exact.dense_terms(problem)["f"]))
    return u[:, :rank] * s[:rank], vt[:rank].T


def perturbed_factor(problem, size, seed=0):
    """f itself with an error in every entry: a factor of full width whose entries need not be
    positive.
    """
    f = np.asarray(exact.dense_terms(problem)["f"])
    return f + size * np.random.default_rng(seed).normal(size=f.shape) / f.shape[1], np.eye(
        f.shape[1]
    )


# -------------------------------------------------------------------------------------------------
# the chain itself


@pytest.mark.parametrize(
    ("shape", "adapt"),
    [*(("cross", a) for a in problems.SUBSETS), *later(*(("self", a) for a in problems.SUBSETS))],
)
def test_the_exact_factor_gives_the_exact_gradient(adapt, shape):
    """U1 = f, V1 = 1: the lemmas as corrected lose nothing."""
    p = problems.make(1, shape=problems.SHAPES[shape], adapt=adapt, reach=3.0)
    want_loss, want = DENSE(p)
    f = np.asarray(exact.dense_terms(p)["f"])
    loss, got = GRADIENT(p, f, np.eye(f.shape[1]))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-13)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize(
    ("shape", "series"), [("cross", "taylor"), *later(("self", "chebyshev"), ("self", "fitted"))]
)
def test_the_error_falls_with_the_degree(shape, series):
    p = problems.make(2, shape=problems.SHAPES[shape], reach=1.0)
    want = arrays(DENSE(p)[1])
    top = max(np.abs(x).max() for x in want.values())
    worst = []
    for degree in (2, 4, 8):
        result = RUN(p, chain.Chain(degree, series))
        got, rank = result.gradient, result.rank
        assert rank == (degree + 2) * (degree + 1) // 2
        worst.append(max(np.abs(x - want[n]).max() for n, x in arrays(got).items()) / top)
    assert worst[0] > 5 * worst[1] > 50 * worst[2]
    assert worst[2] < 1e-4


def test_terms_are_products_of_their_factors_with_the_stated_widths():
    p = problems.make(3, shape=problems.CROSS)
    u1, v1 = FACTOR(p, 3, "taylor")
    t = chain.chain_terms(p, u1, v1)
    f, k, v = t.u1 @ t.v1.T, u1.shape[1], np.asarray(projections(p)[2])
    assert t.u2.shape[1] == t.v2.shape[1] == v.shape[1]
    assert t.u3.shape[1] == t.v3.shape[1] == k * v.shape[1]
    assert t.u4.shape[1] == t.v4.shape[1] == k
    np.testing.assert_allclose(t.c, f @ v - p.target, rtol=1e-12)
    q = t.u2 @ t.v2.T
    np.testing.assert_allclose(q, t.c @ v.T, rtol=1e-12)
    np.testing.assert_allclose(t.rho, (f * q).sum(1), rtol=1e-11)
    np.testing.assert_allclose(t.u3 @ t.v3.T, f * q, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(t.u4 @ t.v4.T, np.diag(t.rho) @ f, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose((t.u3 @ t.v3.T - t.u4 @ t.v4.T).sum(1), 0, atol=1e-13)


def test_rows_of_any_factor_are_normalised():
    p = problems.make(4)
    u1, v1 = FACTOR(p, 2, "taylor")
    scaled = u1 * np.linspace(-2, 3, u1.shape[0])[:, None]
    assert_close(GRADIENT(p, scaled, v1)[1], GRADIENT(p, u1, v1)[1], 1e-11)


def test_large_biases_are_centred_away():
    p = problems.make(5, kind="large biases", reach=0.5)
    assert_close(RUN(p, chain.Chain(8)).gradient, DENSE(p)[1], 1e-6)


def test_dtype_follows_the_inputs():
    p = problems.make(6, dtype=np.float32)
    got = RUN(p, chain.Chain(6))
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert_close(got.gradient, DENSE(p)[1], 1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chain.Chain(-1), "Chain degree: got -1, expected an integer of at least 0"),
        (lambda: chain.Chain(True), "Chain degree: got True"),
        (lambda: chain.Chain(2.0), "Chain degree: got 2.0"),
        (lambda: chain.Chain(2, "fourier"), "Chain series: got 'fourier', expected one of"),
        (lambda: needed.remainder(2, 1.0, "fitted"), "remainder series: got 'fitted'"),
    ],
)
def test_what_is_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------- lemmas, bounds


def within_bounds(p, u1, v1):
    table = {
        name: (float(error), float(bound)) for name, (error, bound) in ERRORS(p, u1, v1).items()
    }
    assert set(LEMMAS) < set(table)
    for name, (error, bound) in table.items():
        assert error <= bound * (1 + 1e-9) + 1e-12 * (1 + table["q"][1]), name
    return table


# among vast biases rounding outweighs the smallest of the errors below, and the bounds do not
# include it
@pytest.mark.parametrize("kind", [kind for kind in problems.KINDS if kind != "vast biases"])
def test_every_lemma_holds_within_its_bound(kind):
    """Lemmas 3.3 to 3.7 and Theorem A.1 with their constants, on factors good and bad."""
    p = problems.make(7, kind=kind, reach=1.5)
    for degree in (2, 4):
        assert within_bounds(p, *FACTOR(p, degree, "taylor"))
    for size in (1e-6, 1e-2, 0.5):
        assert within_bounds(p, *perturbed_factor(p, size))


@pytest.mark.parametrize("adapt", [("value",), problems.FULL], ids="+".join)
def test_every_lemma_holds_in_cross_attention(adapt):
    p = problems.make(8, shape=problems.CROSS, adapt=adapt, reach=2.0)
    table = within_bounds(p, *FACTOR(p, 3, "chebyshev"))
    assert set(table) == {*LEMMAS, *(f"{n}.{half}" for n in adapt for half in ("a", "b"))}
    within_bounds(p, *svd_factor(p, 4))


def test_bounds_are_of_the_order_of_the_errors():
    """Linear in the error of f, and never more than a thousand times too large on plain input."""
    p = problems.make(9, reach=1.0)
    tables = [within_bounds(p, *perturbed_factor(p, size)) for size in (1e-3, 1e-5)]
    for name in tables[0]:
        assert tables[0][name][1] == pytest.approx(100 * tables[1][name][1], rel=0.02)
        assert tables[0][name][1] < 1000 * tables[0][name][0], name


@pytest.mark.parametrize("series", ["taylor", *later("chebyshev")])
@pytest.mark.parametrize("reach", [0.3, 2.0])
def test_the_row_error_of_lemma_3_3_holds(series, reach):
    p = problems.make(10, reach=reach)
    f = np.asarray(exact.dense_terms(p)["f"])
    radius = float(NORMS(p).score_bound)
    for degree in (2, 5):
        u1, v1 = FACTOR(p, degree, series)
        delta = np.abs(np.asarray(u1 @ v1.T) - f).sum(1).max()
        assert delta <= needed.row_error(degree, radius, series) + 1e-14


def test_the_remainder_is_the_largest_error_of_the_series():
    s = np.linspace(-3, 3, 2001)
    for degree in (1, 4, 9):
        taylor = np.polynomial.Polynomial(
            [1 / float(np.prod(np.arange(1, n + 1))) for n in range(degree + 1)]
        )
        assert np.abs(np.exp(s) - taylor(s)).max() == pytest.approx(
            needed.remainder(degree, 3.0), rel=1e-10
        )
        best = np.polynomial.Chebyshev.interpolate(lambda x: np.exp(3 * x), 40).truncate(degree + 1)
        error, bound = (
            np.abs(np.exp(s) - best(s / 3)).max(),
            needed.remainder(degree, 3.0, "chebyshev"),
        )
        assert bound == pytest.approx(error, rel=1e-10)
    assert needed.row_error(0, 5.0) == np.inf
    assert needed.remainder(3, 1e3) == np.inf


# ---------------------------------------------------------------------------------------- against
# the fast gradient


def two_factor_gradient(p, degree):
    """What `Polynomial(degree)` computes, from two factors of the chain: P_g in residual and mean,
    P_{g-1} in p.

    h = diag(D_{g-1} / D_g) f~_{g-1};  p^ = h o (q~_g - rho~_g 1^T);  dl/dQ = beta p^ (K - 1 mu^T);
    dl/dW_K = beta (X_K - 1 m^T)^T (p^^T (Q - 1 nu^T) + p~_g^T 1 nu^T);  dl/dV = f~_g^T c~_g.
    """
    frame, beta = quick_jit(frames.of_problem)(p), scalars(p)[1]
    q, k, _ = projections(p)
    high, low = (FACTOR(p, g, "taylor") for g in (degree, degree - 1))
    t = chain.chain_terms(p, *high)
    # the first column of U1 is 1 / D times that of ones, so the normalisers can be read from the
    # factors
    kernel = (
        (high[0][:, :1] / low[0][:, :1]) * (low[0] @ low[1].T) * (t.u2 @ t.v2.T - t.rho[:, None])
    )
    own = t.u3 @ t.v3.T - t.u4 @ t.v4.T
    rows = {
        "query": beta * kernel @ (k - frame.mu[None]),
        "key": beta * (kernel.T @ (q - frame.nu[None]) + own.sum(0)[:, None] * frame.nu[None]),
        "value": t.v1 @ (t.u1.T @ t.c),
    }
    centred = dataclasses.replace(p, x_key=p.x_key - np.asarray(frame.xk_mean)[None])
    return {n: pull_back(centred if n == "key" else p, n, rows[n]) for n in p.adapters}, 0.5 * (
        t.c**2
    ).sum()


@pytest.mark.parametrize(("shape", "degree"), [("cross", 2)])
def test_the_fast_gradient_is_a_chain_of_two_factors(shape, degree):
    """Exactly: normaliser, mean and residual of degree g; kernel of the gradient of degree g - 1,
    as P' = P_{g-1}.

    For values alone nothing is differentiated, and `Polynomial(g)` is `Chain(g)` to rounding.
    """
    p = problems.make(11, shape=problems.SHAPES[shape], reach=2.0)
    fast = UNCERTIFIED(p, ll.Polynomial(degree))
    got, loss = two_factor_gradient(p, degree)
    np.testing.assert_allclose(fast.loss, loss, rtol=1e-12)
    assert_close(fast.gradient, got, 1e-11)
    own = RUN(p, chain.Chain(degree)).gradient
    assert_close({"value": own["value"]}, {"value": fast.gradient["value"]}, 1e-11)


def test_chain_and_fast_gradient_one_degree_higher_agree_to_the_order_of_the_remainder():
    """Not equal: they differ by what one more degree adds to the residual, of the order of the
    error itself.
    """
    gaps, errors = [], []
    for reach in (0.4, 0.2):
        p = problems.make(12, reach=reach, shape=problems.CROSS)
        many = (
            DENSE(p)[1],
            UNCERTIFIED(p, ll.Polynomial(2)).gradient,
            RUN(p, chain.Chain(1)).gradient,
        )
        want, fast, slow = (arrays(g)["query.a"] for g in many)
        gaps.append(np.abs(fast - slow).max() / np.abs(want).max())
        errors.append(np.abs(slow - want).max() / np.abs(want).max())
    assert gaps[0] > 1e-4
    for sizes in (gaps, errors):
        assert np.log2(sizes[0] / sizes[1]) > 1.4


def test_vmap_over_a_batch_equals_one_by_one():
    many = [problems.make(seed) for seed in (14, 15)]
    batched = quick_jit(
        jax.vmap(functools.partial(ll.gradient, method=chain.Chain(2))),
    )(problems.stack(many))
    for i, p in enumerate(many):
        assert_close(
            jax.tree.map(lambda x, i=i: x[i], batched.gradient),
            RUN(p, chain.Chain(2)).gradient,
            1e-11,
        )
    assert jnp.shape(batched.loss) == (2,)
