"""Matrix products at full precision: what every sum over tokens is made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Scores and moments feed an error claim, so no matrix product here may drop to TF32 or bfloat16.
PRECISION = jax.lax.Precision.HIGHEST


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product at the full precision of its inputs."""
    return jnp.matmul(a, b, precision=PRECISION)


def down(x: jax.Array) -> jax.Array:
    """Sums down the columns: (d, n) -> (1, n). A product: XLA's CPU reductions over so short an
    axis are far slower.
    """
    return dot(jnp.ones((1, x.shape[0]), x.dtype), x)


def columns_of(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """(x matrix)^T for rows x (L, d_model), matrix (d_model, d): (d, L), with no copy of x turned
    round.
    """
    return jax.lax.dot_general(matrix, x, (((0,), (1,)), ((), ())), precision=PRECISION)
