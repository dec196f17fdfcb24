"""Rounding, worst case: how far a computed sum, product or projection may be from the true one.

What is assumed of the arithmetic, and tested on the backend in use:

    IEEE double precision, rounded to nearest; sums in any order, products fused into them or not:
    a sum of n terms errs by at most gamma_n = n u / (1 - n u) times the sum of absolute values,
    u = 2^-53.
    exp errs by at most EXP_ULP units in the last place; so do log, of weights, and the cosine and
    sine of an angle, in units of the last place of 1.
    An operation that underflows loses at most the smallest normal number (`lost` in bound.py).

Nothing is assumed of how errors are distributed. Everything here is of first order; SECOND covers
the products of two errors, as long as no error is above a thousandth (bound.py sees to that).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.linalg import down
from lora_limits.problem import LoRAProblem, scalars

EXP_ULP = 4
SECOND = 1.05


def column_lengths(x: Float[Array, "d n"]) -> Float[Array, "1 n"]:
    """Norms of the columns, never below the true ones because a square underflows."""
    return jnp.sqrt(down(x**2) + x.shape[0] * tiny(x))


def row_lengths(x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Norms of the rows, as above."""
    return jnp.sqrt((x**2).sum(1) + x.shape[1] * tiny(x))


def frobenius(x: Float[Array, ...]) -> Float[Array, ""]:
    """The Frobenius norm of an array of any shape, as above."""
    return jnp.sqrt((x**2).sum() + x.size * tiny(x))


def tiny(x: Array) -> float:
    """The smallest normal number: what an operation that underflows may lose."""
    return float(jnp.finfo(x.dtype).tiny)


def lost_root(problem: LoRAProblem, parts: int = 1) -> float:
    """More than the root of a column's moment can lose to squares, and products, that underflow.

    In units of the root of the moment of 1, in the same measure.
    """
    tokens = parts * (problem.x_query.shape[0] + problem.x_key.shape[0])
    terms = tokens * problem.weights.value.shape[1]
    return (1e6 * terms * float(jnp.finfo(problem.dtype).tiny)) ** 0.5


def unit_roundoff(problem: LoRAProblem) -> float:
    """u: what one operation may err by, relative to its result."""
    return float(jnp.finfo(problem.dtype).eps) / 2


def gamma(problem: LoRAProblem, n: int) -> float:
    """gamma_n: what a sum of n rounded terms may err by, relative to the sum of absolute values."""
    part = n * unit_roundoff(problem)
    return part / (1 - part) if part < 0.5 else float("inf")


def sum_rounding(problem: LoRAProblem, k: int, degree: int, block: int, parts: int = 1) -> float:
    """gamma of the longest chain of operations between the tokens and an entry of the gradient.

    Features of a token, a sum over tokens (in blocks, over blocks, over devices or chunks), an
    evaluation through k features, and for keys a second sum and a second evaluation.
    problem: what one of the `parts` (devices, chunks) holds, at most.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    longest = max(problem.x_query.shape[0], problem.x_key.shape[0])
    over_tokens = min(block, longest) + -(-longest // block) + (parts - 1)
    return gamma(problem, 2 * (over_tokens + k + 4 * degree + 4 * d + 2 * dv + 32))


def projection_size(problem: LoRAProblem, name: str) -> jax.Array:
    """>= the 2-norm of a row of x (W* + s B A) for |x| = 1: ()."""
    size = frobenius(getattr(problem.weights, name))
    if name in problem.adapters:
        a, b = problem.adapters[name].a, problem.adapters[name].b
        size = size + jnp.abs(scalars(problem)[0]) * frobenius(a) * frobenius(b)
    return size


def projection_rounding(problem: LoRAProblem, name: str) -> jax.Array:
    """Rounding of a row of x (W* + s B A), in the 2-norm, for |x| = 1: ()."""
    d_in, d = getattr(problem.weights, name).shape
    r = problem.adapters[name].a.shape[0] if name in problem.adapters else 0
    return gamma(problem, d_in + 2 * d + r + 16) * projection_size(problem, name)


def inner_rounding(problem: LoRAProblem, name: str) -> jax.Array:
    """Rounding of a row of x B, in the 2-norm, for |x| = 1: ()."""
    b = problem.adapters[name].b
    return gamma(problem, b.shape[0] + 4) * frobenius(b)
