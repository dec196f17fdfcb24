"""The polynomials against the theory of best approximation, and their envelopes against dense
grids.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import iv

from lora_limits.polynomial import series as polynomial
from tests.support.tools import later, quick_jit

RADII = (0.05, 0.4, 1.0, 3.0, 8.0)
DEGREES = (1, 2, 3, 5, 6)


def grid(radius, n=4001):
    return radius * np.cos(np.pi * np.arange(n) / (n - 1))


def residual(c, s):
    """exp(s) - P(s), by NumPy."""
    return np.exp(s) - np.polynomial.polynomial.polyval(s, np.asarray(c))


def tail(degree, radius):
    """T_g = 2 sum_{n > g} I_n(R)."""
    return 2 * sum(iv(n, radius) for n in range(degree + 1, degree + 80))


@pytest.fixture(scope="module")
def series():
    """(name, degree, radius) -> coefficients; the sample of "fitted" fills the middle fifth of the
    range.
    """
    run = quick_jit(polynomial.coefficients, static_argnums=(0, 1))

    def get(name, degree, radius):
        s = 0.2 * radius * np.random.default_rng(0).uniform(-1, 1, 200)
        return np.asarray(run(name, degree, np.float64(radius), (s, np.ones(200))))

    return get


@pytest.mark.parametrize("degree", DEGREES)
def test_the_derivative_of_the_chebyshev_series_is_within_the_brackets(series, degree):
    """(pi/2) I_{g+1}(R) <= best error <= error of the cut series <= T_g, for P' of degree g - 1."""
    for radius in RADII:
        c = series("chebyshev", degree, radius)
        s = grid(radius)
        prime = np.abs(residual(np.polynomial.polynomial.polyder(c), s)).max()
        noise = 1e-13 * np.exp(radius)
        assert np.pi / 2 * iv(degree, radius) <= prime + noise
        assert prime <= tail(degree - 1, radius) + noise
        for name in polynomial.SERIES:
            error = np.abs(residual(series(name, degree, radius), s)).max()
            assert np.pi / 2 * iv(degree + 1, radius) <= error + noise, name
        # integrating costs at most the range: e(s) has Chebyshev mean 0, so it vanishes somewhere
        assert np.abs(residual(c, s)).max() <= 2 * radius * prime + noise


@pytest.mark.parametrize("degree", DEGREES)
def test_chebyshev_beats_taylor_on_the_range_and_loses_at_the_centre(series, degree):
    """In the derivative, which is what the series is built for."""
    for radius in (1.0, 3.0, 8.0):
        taylor, minimax = (
            np.polynomial.polynomial.polyder(series(name, degree, radius))
            for name in ("taylor", "chebyshev")
        )
        s = grid(radius)
        assert np.abs(residual(minimax, s)).max() < np.abs(residual(taylor, s)).max()
        assert np.abs(residual(minimax, s * 0.01)).max() > np.abs(residual(taylor, s * 0.01)).max()


@pytest.mark.parametrize("degree", DEGREES)
def test_the_constant_of_the_chebyshev_series_has_the_right_mean(series, degree):
    s = 3.0 * np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    assert abs(residual(series("chebyshev", degree, 3.0), s).mean()) < 1e-12


@pytest.mark.parametrize("degree", DEGREES)
def test_fitted_is_the_least_squares_fit_of_the_derivative(series, degree):
    """Its residual is orthogonal to every power below g on the sample, and the mean of exp - P
    vanishes there.
    """
    radius = 3.0
    s = 0.2 * radius * np.random.default_rng(0).uniform(-1, 1, 200)
    fitted = series("fitted", degree, radius)
    e = residual(np.polynomial.polynomial.polyder(fitted), s)
    taylor = residual(series("taylor", degree - 1, radius), s)
    assert np.sqrt((e**2).mean()) <= np.sqrt((taylor**2).mean())
    for n in range(degree):
        assert abs((e * (s / radius) ** n).mean()) < 1e-8
    assert abs(residual(fitted, s).mean()) < 1e-12


def test_fitted_falls_back_on_chebyshev_when_the_sample_says_nothing(series):
    run = quick_jit(polynomial.coefficients, static_argnums=(0, 1))
    got = np.asarray(run("fitted", 3, np.float64(2.0), (np.zeros(50), np.ones(50))))
    prime = np.polynomial.polynomial.polyder(got)
    assert np.isfinite(got).all()
    assert abs(residual(prime, 0.0)) < 1e-10
    assert np.abs(residual(prime, grid(2.0))).max() < 3 * tail(2, 2.0)


def test_taylor_horner_and_derivative():
    c = polynomial.taylor(5, np.float64)
    np.testing.assert_array_equal(c, [1 / math.factorial(n) for n in range(6)])
    s = np.linspace(-3, 3, 11)
    np.testing.assert_allclose(
        polynomial.evaluate(c, jnp.asarray(s)), np.polynomial.polynomial.polyval(s, np.asarray(c))
    )
    np.testing.assert_allclose(polynomial.derivative(c), c[:-1], rtol=1e-15)
    assert polynomial.derivative(c[:1]).shape == (1,)
    assert float(polynomial.derivative(c[:1])[0]) == 0.0


REMAINDER = quick_jit(polynomial.remainder_factor, static_argnums=0)


@pytest.mark.parametrize("power", [1, 8, *later(2, 3, 5)])
def test_remainder_factor_bounds_the_series_and_hardly_more(power):
    """phi_p(R) = sum_n R^n / (n + p)! in exact rational arithmetic."""
    radii = np.array([0.0, 1e-8, 0.01, 0.3, 1.0, 2.5, 6.0, 10.0, 15.0, 30.0, 100.0])
    got = np.asarray(REMAINDER(power, radii))
    for radius, phi in zip(radii, got, strict=True):
        r, term, exact = Fraction(float(radius)), Fraction(1, math.factorial(power)), Fraction(0)
        for n in range(500):
            exact += term
            term = term * r / (n + 1 + power)
        assert phi >= float(exact) * (1 - 1e-14), radius
        assert phi <= float(exact) * (1.01 if radius <= 6 else math.exp(radius)), radius
        assert phi <= math.exp(radius) / math.factorial(power) * (1 + 1e-14)
        if radius <= 2.5:
            assert phi <= float(exact) * (1 + 1e-8)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_remainder_factor_is_the_lagrange_remainder_of_taylor(power):
    """|exp(s) - P_{p-1}(s)| <= phi_p(R) |s|^p on [-R, R], with equality at s = R."""
    for radius in (0.5, 2.0, 5.0):
        s = grid(radius)
        phi = float(REMAINDER(power, np.full(11, radius))[0])
        error = np.abs(residual(polynomial.taylor(power - 1, np.float64), s))
        assert (error <= phi * np.abs(s) ** power * (1 + 1e-12) + 1e-14 * np.exp(radius)).all()
        np.testing.assert_allclose(error[0], phi * radius**power, rtol=1e-3)


ENVELOPE = quick_jit(
    jax.vmap(polynomial.envelope, in_axes=(0, 0, None, 0)),
    static_argnums=2,
)


def random_polynomials(rng, n, degree):
    """Nearly exp (Taylor with perturbed coefficients), and nothing like it."""
    base = np.array([1 / math.factorial(m) for m in range(degree + 1)])
    noise = rng.normal(size=(n, degree + 1)) * 10.0 ** rng.uniform(-6, 1, size=(n, 1))
    return np.where(np.arange(n)[:, None] % 2 == 0, base * (1 + noise), base + noise)


@pytest.mark.parametrize(("degree", "power"), [(0, 0), (3, 4), *later((1, 2), (2, 2), (6, 6))])
def test_envelopes_are_above_the_error_everywhere_and_near_the_best_of_their_kind(degree, power):
    """|exp - P| <= h0 + h1 |s|^p on a grid finer than the cells; the cost against a linear
    programme on the grid.
    """
    rng = np.random.default_rng(degree)
    n = 40
    c, radius = random_polynomials(rng, n, degree), 10.0 ** rng.uniform(-2, 1, n)
    weight = np.array([(np.abs(0.3 * r * rng.uniform(-1, 1, 50)) ** power).mean() for r in radius])
    h0, h1 = (np.asarray(h) for h in ENVELOPE(c, radius, power, weight))
    assert (h0 >= 0).all()
    assert (h1 >= 0).all()
    looseness = []
    for i in range(n):
        s = grid(radius[i], 3001)
        error, column = np.abs(residual(c[i], s)), np.abs(s) ** power
        assert (error <= h0[i] + h1[i] * column).all(), (c[i], radius[i])
        # in units of the largest error and of R^p, so that the solver sees numbers of order one
        scale = np.array([1.0, radius[i] ** -power])
        best = linprog(
            np.array([1.0, weight[i]]) * scale,
            A_ub=-np.stack([np.ones_like(s), column], 1) * scale,
            b_ub=-error / error.max(),
            bounds=[(0, None)] * 2,
        )
        least = best.fun * error.max()
        if least > 1e-11 * np.exp(radius[i]):  # else it is all rounding
            looseness.append((h0[i] + h1[i] * weight[i]) / least)
    assert len(looseness) > n / 2
    assert min(looseness) >= 1 - 1e-4
    assert np.median(looseness) < 1.15
    assert max(looseness) < 2.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_envelopes_include_their_own_rounding(dtype):
    """Degree 8 on a short range: the error of P is far below epsilon, and the bound must not be."""
    c, radius = polynomial.taylor(8, dtype), np.asarray(0.05, dtype)
    h0, h1 = (h[0] for h in ENVELOPE(c[None], radius[None], 9, np.zeros(1, dtype)))
    s = grid(0.05)
    p = np.asarray(polynomial.evaluate(c, jnp.asarray(s, dtype)), np.longdouble)
    assert (
        np.abs(np.exp(s.astype(np.longdouble)) - p) <= np.longdouble(h0) + np.longdouble(h1)
    ).all()
    assert float(h0) > np.finfo(dtype).eps
