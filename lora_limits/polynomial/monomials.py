"""Symmetric monomial features, feature axis first.

(x . y)^n = sum over |alpha| = n of multinomial(alpha) x^alpha y^alpha, so a polynomial of degree g
in the scores is an inner product of k = binom(d + g, g) features. They are ordered by degree;
within a degree, those that use only the first i variables come first. Hence the block of degree n
whose last variable is i is x_i times a *prefix* of degree n - 1: features are built from the degree
below, one multiplication each. What is to be evaluated rather than summed never needs the features
of the top degree, which are most of them: see evaluation.py.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_limits.linalg import dot


def count(width: int, degree: int) -> int:
    """k = binom(width + degree, degree), the monomials of degree at most `degree`; 0 below 0."""
    return math.comb(width + degree, degree) if degree >= 0 else 0


def block_counts(width: int, degree: int) -> list[int]:
    """How many monomials of exactly `degree` >= 1 have last variable 1, 2, ..., width.

    They are also the lengths of the prefixes that these are built from.
    """
    return [math.comb(i + degree - 2, degree - 1) for i in range(1, width + 1)]


@functools.lru_cache(maxsize=64)
def exponents(width: int, degree: int) -> list[Int[np.ndarray, "_ width"]]:
    """The exponents of the features of each degree 0..degree, in order, a row a feature."""
    out = [np.zeros((1, width), int)]
    for n in range(1, degree + 1):
        rows = []
        # Those with last variable i are x_i times the first m of the degree below.
        for i, m in enumerate(block_counts(width, n)):
            block = out[-1][:m].copy()
            block[:, i] += 1
            rows.append(block)
        out.append(np.concatenate(rows))
    return out


@functools.lru_cache(maxsize=64)
def tables(width: int, degree: int) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """(degree, multinomial coefficient) of every feature, in order, float64, exact below 2^53."""
    alpha = np.concatenate(exponents(width, degree))
    order = alpha.sum(1)
    factorial = np.array([math.factorial(n) for n in range(degree + 1)], float)
    return order.astype(float), factorial[order] / factorial[alpha].prod(1)


def coefficients(c: Float[Array, " g_and_1"], width: int) -> Float[Array, "k 1"]:
    """The diagonal of C, with psi(x) . C phi(y) = P(x . y), P of coefficients c."""
    order, multinomial = tables(width, c.shape[0] - 1)
    of_degree = c[order.astype(np.int32)]
    return (of_degree * jnp.asarray(multinomial, c.dtype))[:, None]


@functools.lru_cache(maxsize=64)
def _sources(width: int, degree: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(which feature of degree - 1, which variable) each feature of `degree` is the product of."""
    lengths = block_counts(width, degree)
    lower = np.concatenate([np.arange(m) for m in lengths])
    variable = np.repeat(np.arange(width, dtype=np.int32), lengths)
    return lower.astype(np.int32), variable


def by_degree(x: Float[Array, "d n"], degree: int) -> list[Float[Array, "_ n"]]:
    """The features of each degree 0..degree: (1, n), (d, n), ..., (binom(d + g - 1, g), n)."""
    out = [jnp.ones_like(x[:1]), x][: degree + 1]
    for n in range(2, degree + 1):
        of_lower, of_variable = _sources(x.shape[0], n)
        lower = out[-1].at[of_lower].get(mode="promise_in_bounds")
        variable = x.at[of_variable].get(mode="promise_in_bounds")
        # A barrier: fused into its consumers, a degree would be compiled (and computed) once for
        # each of them.
        out.append(jax.lax.optimization_barrier(lower * variable))
    return out


def features(x: Float[Array, "d n"], degree: int) -> Float[Array, "k n"]:
    """All monomials of degree at most `degree`. One multiplication a feature."""
    return jnp.concatenate(by_degree(x, degree))


@functools.lru_cache(maxsize=64)
def raised(
    width: int, degree: int
) -> tuple[Int[np.ndarray, "width n"], Int[np.ndarray, "width n"]]:
    """Where x_i phi_b lies, for every i and every b of exactly `degree`: d/dx_i read backwards.

    (the position of b + e_i among the features of degree + 1, its exponent of x_i, which is the
    multiplicity b_i + 1). O(width k) time on the host, once for each size.
    """
    low = exponents(width, degree)[-1]
    high = exponents(width, degree + 1)[-1]
    position = {tuple(a): at for at, a in enumerate(high)}
    index = [[position[tuple(b + e)] for b in low] for e in np.eye(width, dtype=int)]
    return np.array(index, np.int32), low.T + 1


def products(parts: list[Float[Array, "_ n"]], z: Float[Array, "c n"]) -> Float[Array, "k c"]:
    """sum over tokens of phi z, phi given by degree. Copies the lower degrees only."""
    # The top degree has most of the features: it is multiplied where it lies.
    top = dot(parts[-1], z.T)
    if len(parts) == 1:
        return top
    return jnp.concatenate([dot(jnp.concatenate(parts[:-1]), z.T), top])
