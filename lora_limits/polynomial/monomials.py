"""Symmetric monomial features, feature axis first.

(x . y)^n = sum over |alpha| = n of multinomial(alpha) x^alpha y^alpha, so a polynomial of degree g
in the scores is an inner product of k = binom(d + g, g) features. They are ordered by degree;
within a degree, those that use only the first i variables come first. Hence the block of degree n
whose last variable is i is x_i times a *prefix* of degree n - 1: features are built from the degree
below, one multiplication each. What is to be evaluated rather than summed never needs the features
of the top degree, which are most of them: see lift.py.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.linalg import dot


def count(width: int, degree: int) -> int:
    """k = binom(width + degree, degree), the number of monomials of degree at most `degree`; 0
    below degree 0.
    """
    return math.comb(width + degree, degree) if degree >= 0 else 0


def block_counts(width: int, degree: int) -> list[int]:
    """How many monomials of exactly `degree` >= 1 have last variable 1, 2, ..., width; they are
    also prefix lengths.
    """
    return [math.comb(i + degree - 2, degree - 1) for i in range(1, width + 1)]


@functools.lru_cache(maxsize=64)
def exponents(width: int, degree: int) -> list[np.ndarray]:
    """The exponents of the features of each degree 0..degree, in order: (binom(width + n - 1, n),
    width) integers.
    """
    out = [np.zeros((1, width), int)]
    for n in range(1, degree + 1):
        rows = []
        for i, m in enumerate(block_counts(width, n)):
            block = out[-1][:m].copy()
            block[:, i] += 1
            rows.append(block)
        out.append(np.concatenate(rows))
    return out


@functools.lru_cache(maxsize=64)
def tables(width: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """(degree, multinomial coefficient) of every feature, in order; each (k,), float64, exact below
    2^53.
    """
    alpha = np.concatenate(exponents(width, degree))
    order = alpha.sum(1)
    factorial = np.array([math.factorial(n) for n in range(degree + 1)], float)
    return order.astype(float), factorial[order] / factorial[alpha].prod(1)


def coefficients(c: jax.Array, width: int) -> jax.Array:
    """The diagonal of C, with psi(x) . C phi(y) = P(x . y), P of coefficients c: (k, 1)."""
    order, multinomial = tables(width, c.shape[0] - 1)
    return (c[order.astype(np.int32)] * jnp.asarray(multinomial, c.dtype))[:, None]


@functools.lru_cache(maxsize=64)
def _sources(width: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """(which feature of degree - 1, which variable) each feature of `degree` is the product of."""
    lengths = block_counts(width, degree)
    lower = np.concatenate([np.arange(m) for m in lengths])
    return lower.astype(np.int32), np.repeat(np.arange(width, dtype=np.int32), lengths)


def by_degree(x: jax.Array, degree: int) -> list[jax.Array]:
    """The features of each degree 0..degree: x (d, n) -> [(1, n), (d, n), ..., (binom(d + g - 1,
    g), n)].
    """
    out = [jnp.ones_like(x[:1]), x][: degree + 1]
    for n in range(2, degree + 1):
        lower, variable = (
            a.at[i].get(mode="promise_in_bounds")
            for a, i in zip((out[-1], x), _sources(x.shape[0], n), strict=True)
        )
        # a barrier: fused into its consumers, a degree would be compiled (and computed) once for
        # each of them
        out.append(jax.lax.optimization_barrier(lower * variable))
    return out


def features(x: jax.Array, degree: int) -> jax.Array:
    """All monomials of degree at most `degree`: (d, n) -> (k, n). One multiplication a feature."""
    return jnp.concatenate(by_degree(x, degree))


@functools.lru_cache(maxsize=64)
def raised(width: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Where x_i phi_b lies, for every i and every feature b of exactly `degree`: d phi / d x_i read
    backwards.

    Both (width, binom(width + degree - 1, degree)): the position of b + e_i among the features of
    degree + 1, and its exponent of x_i, which is the multiplicity b_i + 1. O(width k) time on the
    host, once for each size.
    """
    low, high = (exponents(width, n)[-1] for n in (degree, degree + 1))
    position = {tuple(a): at for at, a in enumerate(high)}
    index = [[position[tuple(b + e)] for b in low] for e in np.eye(width, dtype=int)]
    return np.array(index, np.int32), low.T + 1


def products(parts: list[jax.Array], z: jax.Array) -> jax.Array:
    """sum over tokens of phi z: parts (., n) by degree, z (c, n) -> (k, c). Copies the lower
    degrees only.
    """
    if len(parts) == 1:
        return dot(parts[0], z.T)
    return jnp.concatenate([dot(jnp.concatenate(parts[:-1]), z.T), dot(parts[-1], z.T)])
