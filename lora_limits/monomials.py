"""Symmetric monomial features, feature axis first.

(x . y)^n = sum over |alpha| = n of multinomial(alpha) x^alpha y^alpha, so a polynomial of degree g in the scores is an
inner product of k = binom(d + g, g) features. They are ordered by degree; within a degree, those that use only the
first i variables come first. Hence the block of degree n whose last variable is i is x_i times a *prefix* of degree
n - 1: features are built from slices, one multiplication each, and differentiated by the same slices backwards.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def count(width: int, degree: int) -> int:
    """k = binom(width + degree, degree), the number of monomials of degree at most `degree`."""
    return math.comb(width + degree, degree)


def block_counts(width: int, degree: int) -> list[int]:
    """How many monomials of exactly `degree` >= 1 have last variable 1, 2, ..., width; they are also prefix lengths."""
    return [math.comb(i + degree - 2, degree - 1) for i in range(1, width + 1)]


@functools.lru_cache(maxsize=64)
def tables(width: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """(degree, multinomial coefficient) of every feature, in order; each (k,), float64, exact below 2^53."""
    exponents = [np.zeros((1, width), int)]
    for n in range(1, degree + 1):
        rows = []
        for i, m in enumerate(block_counts(width, n)):
            block = exponents[-1][:m].copy()
            block[:, i] += 1
            rows.append(block)
        exponents.append(np.concatenate(rows))
    alpha = np.concatenate(exponents)
    order = alpha.sum(1)
    factorial = np.array([math.factorial(n) for n in range(degree + 1)], float)
    return order.astype(float), factorial[order] / factorial[alpha].prod(1)


def by_degree(x: jax.Array, degree: int) -> list[jax.Array]:
    """The features of each degree 0..degree: x (d, n) -> [(1, n), (d, n), ..., (binom(d + g - 1, g), n)]."""
    out = [jnp.ones_like(x[:1])]
    for n in range(1, degree + 1):
        blocks = [x[i : i + 1] * out[-1][:m] for i, m in enumerate(block_counts(x.shape[0], n))]
        # a barrier: fused into its consumers, a degree would be compiled (and computed) once for each of them
        out.append(jax.lax.optimization_barrier(jnp.concatenate(blocks)))
    return out


def features(x: jax.Array, degree: int) -> jax.Array:
    """All monomials of degree at most `degree`: (d, n) -> (k, n). One multiplication a feature."""
    return jnp.concatenate(by_degree(x, degree))


def pull_back(x: jax.Array, parts: list[jax.Array], cotangent: jax.Array) -> jax.Array:
    """Gradient of <features(x), cotangent> in x, column by column: (d, n). Two multiplications a feature.

    parts: what by_degree(x, g) returned; cotangent: (k, n). Walks the construction backwards: degree n hands each of
    its blocks to x_i and to the prefix of degree n - 1 that it was made from.
    """
    width, degree = x.shape[0], len(parts) - 1
    rows: list[jax.Array] = [jnp.zeros_like(x[0])] * width
    high = cotangent[count(width, degree - 1) :] if degree else cotangent
    for n in range(degree, 0, -1):
        start = count(width, n - 2) if n > 1 else 0
        low = cotangent[start : start + parts[n - 1].shape[0]]
        at, pieces = 0, []
        for i, m in enumerate(block_counts(width, n)):
            block = high[at : at + m]
            rows[i] = rows[i] + (block * parts[n - 1][:m]).sum(0)
            pieces.append(x[i : i + 1] * block)
            at += m
        # the prefixes are nested, so a sum over them is a suffix sum over the pieces between consecutive lengths
        low_pieces, before = [], 0
        for i, m in enumerate(block_counts(width, n)):
            if m > before:
                low_pieces.append(sum(p[before:m] for p in pieces[i:]))
            before = m
        high = jax.lax.optimization_barrier(low + jnp.concatenate(low_pieces))
    return jnp.stack(rows)
