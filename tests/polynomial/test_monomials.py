"""Symmetric monomial features: their number, the kernel they factor, and the derivative."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_limits.polynomial import monomials
from tests.support.tools import quick_jit

SIZES = [(1, 0), (1, 5), (2, 3), (3, 0), (3, 1), (4, 3), (6, 2)]


def tokens(width, n=7, seed=0):
    return np.random.default_rng(seed).normal(size=(width, n))


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_the_features_are_all_monomials_each_once_in_order_of_degree(width, degree):
    """Evaluated at logarithms of primes a monomial names its exponents."""
    exponents = [a for a in itertools.product(range(degree + 1), repeat=width) if sum(a) <= degree]
    assert len(exponents) == math.comb(width + degree, degree) == monomials.count(width, degree)
    primes = np.array([2.0, 3, 5, 7, 11, 13])[:width]
    got = np.asarray(quick_jit(monomials.features, static_argnums=1)(primes[:, None], degree))[:, 0]
    want = {math.prod(int(p) ** n for p, n in zip(primes, a, strict=True)): a for a in exponents}
    assert sorted(got.astype(int)) == sorted(want)
    order, multinomial = monomials.tables(width, degree)
    alpha = [want[int(v)] for v in got]
    np.testing.assert_array_equal(order, [sum(a) for a in alpha])
    assert list(order) == sorted(order)
    expected = [math.factorial(sum(a)) / math.prod(map(math.factorial, a)) for a in alpha]
    np.testing.assert_array_equal(multinomial, expected)


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_each_degree_factors_a_power_of_the_inner_product(width, degree):
    """(x . y)^n = sum over |alpha| = n of multinomial(alpha) x^alpha y^alpha."""
    x, y = tokens(width), tokens(width, seed=1)
    order, multinomial = monomials.tables(width, degree)
    run = quick_jit(monomials.by_degree, static_argnums=1)
    parts_x, parts_y = run(x, degree), run(y, degree)
    assert len(parts_x) == degree + 1
    for n in range(degree + 1):
        kernel = (np.asarray(parts_x[n]) * multinomial[order == n, None]).T @ np.asarray(parts_y[n])
        np.testing.assert_allclose(kernel, (x.T @ y) ** n, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_blocks_and_prefixes_have_the_stated_lengths(width, degree):
    for n in range(1, degree + 1):
        blocks = monomials.block_counts(width, n)
        assert sum(blocks) == math.comb(width + n - 1, n)
        assert blocks[-1] == math.comb(
            width + n - 2, n - 1
        )  # the last variable times all of degree n - 1
        assert blocks == sorted(blocks)


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_raised_names_the_product_with_each_variable(width, degree):
    index, multiplicity = monomials.raised(width, degree)
    low, high = (monomials.exponents(width, n)[-1] for n in (degree, degree + 1))
    for i in range(width):
        np.testing.assert_array_equal(high[index[i]], low + np.eye(width, dtype=int)[i])
        np.testing.assert_array_equal(multiplicity[i], high[index[i], i])


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_products_are_those_of_all_features(width, degree):
    x, z = (
        jnp.asarray(tokens(width)),
        np.random.default_rng(3).normal(size=(2, tokens(width).shape[1])),
    )
    got = quick_jit(lambda v: monomials.products(monomials.by_degree(v, degree), jnp.asarray(z)))(x)
    np.testing.assert_allclose(
        got, np.asarray(monomials.features(x, degree)) @ z.T, rtol=1e-12, atol=1e-12
    )


def test_one_multiplication_a_feature():
    """Counted on the jaxpr at width 5, degree 4, 1000 tokens: k = 126 features."""
    width, degree, n = 5, 4, 1000
    x = jax.ShapeDtypeStruct((width, n), np.float64)
    eqns = jax.make_jaxpr(lambda v: monomials.features(v, degree))(x).jaxpr.eqns
    multiplications = sum(e.outvars[0].aval.size for e in eqns if e.primitive.name == "mul") / n
    assert multiplications <= monomials.count(width, degree)


def test_dtype_follows():
    parts = jax.eval_shape(
        lambda x: monomials.by_degree(x, 3), jax.ShapeDtypeStruct((3, 7), np.float32)
    )
    assert {p.dtype for p in parts} == {np.dtype(np.float32)}
