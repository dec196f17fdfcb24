"""Values and gradients of polynomials without the features of the top degree, against those of all
features.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_limits.polynomial import evaluation, monomials
from tests.support.tools import quick_jit

SIZES = [(1, 0), (1, 4), (2, 1), (3, 2), (2, 5), (4, 3)]


def case(width, degree, count=3, n=7):
    rng = np.random.default_rng(width + 10 * degree)
    coefficients = rng.normal(size=(monomials.count(width, degree), count))
    return jnp.asarray(coefficients), jnp.asarray(rng.normal(size=(width, n)))


@pytest.mark.parametrize(("width", "degree"), SIZES)
@pytest.mark.parametrize("slopes", [0, 2, 3])
def test_values_and_slopes(width, degree, slopes):
    coefficients, x = case(width, degree)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(slopes, x.shape[1])))

    @quick_jit
    def both(coefficients, x, weights):
        parts = monomials.by_degree(x, max(degree - 1, 0))
        made = evaluation.make(coefficients, slopes, width, degree)
        values = evaluation.evaluate(made, x, parts)
        plain, back = jax.vjp(lambda v: coefficients.T @ monomials.features(v, degree), x)
        padded = jnp.concatenate([weights, jnp.zeros((coefficients.shape[1] - slopes, x.shape[1]))])
        got = evaluation.slope(made, values, x, parts, weights) if slopes else back(padded)[0]
        return values.low + values.top, plain, got, back(padded)[0]

    value, want_value, slope, want_slope = both(coefficients, x, weights)
    np.testing.assert_allclose(value, want_value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("degree", [2, 3])
def test_the_two_parts_are_those_below_and_of_the_top_degree(degree):
    coefficients, x = case(3, degree)
    values = evaluation.evaluate(
        evaluation.make(coefficients, 0, 3, degree), x, monomials.by_degree(x, degree - 1)
    )
    low = monomials.count(3, degree - 1)
    phi = monomials.features(x, degree)
    np.testing.assert_allclose(values.low, coefficients[:low].T @ phi[:low], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(values.top, coefficients[low:].T @ phi[low:], rtol=1e-12, atol=1e-12)


def test_no_intermediate_is_as_long_as_the_features():
    """Counted on the jaxpr at width 8, degree 4: k = 495 features, of which 330 of the top degree
    are never built.
    """
    width, degree, n, count = 8, 4, 1000, 2
    shapes = jax.ShapeDtypeStruct((monomials.count(width, degree), count), np.float64)

    def run(coefficients, x):
        parts = monomials.by_degree(x, degree - 1)
        made = evaluation.make(coefficients, count, width, degree)
        values = evaluation.evaluate(made, x, parts)
        return evaluation.slope(made, values, x, parts, values.low)

    eqns = jax.make_jaxpr(run)(shapes, jax.ShapeDtypeStruct((width, n), np.float64)).jaxpr.eqns
    longest = max(v.aval.shape[0] for e in eqns for v in e.outvars if v.aval.shape[-1:] == (n,))
    assert longest <= monomials.count(width, degree - 1) < monomials.count(width, degree)
