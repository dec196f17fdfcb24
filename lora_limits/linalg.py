"""Matrix products at full precision, and the norms made of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# A problem may hold arrays of NumPy where nothing is traced yet.
AnyArray = jax.Array | np.ndarray
# Scores and moments feed an error claim, so no matrix product here may drop to TF32 or bfloat16.
PRECISION = jax.lax.Precision.HIGHEST


def dot(a: AnyArray, b: AnyArray) -> jax.Array:
    """Matrix product at the full precision of its inputs."""
    return jnp.matmul(a, b, precision=PRECISION)


def down(x: Float[Array, "d n"]) -> Float[Array, "1 n"]:
    """Sums down the columns.

    A product, because XLA's CPU reductions over so short an axis are far slower.
    """
    return dot(jnp.ones((1, x.shape[0]), x.dtype), x)


def column_norms(x: Float[Array, "d n"]) -> Float[Array, "1 n"]:
    """Euclidean norms of the columns."""
    return jnp.sqrt(down(x**2))


def row_norms(x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Euclidean norms of the rows."""
    return jnp.sqrt((x**2).sum(1))


def largest(x: Float[Array, ...]) -> Float[Array, ""]:
    """The largest entry of all; NaN if any is NaN.

    XLA's maximum over thousands of entries passes NaN by (CPU, jax 0.10.2), and what is promised of
    an array must not.
    """
    return jnp.where(jnp.isnan(x).any(), jnp.nan, x.max())


def frobenius(x: Float[AnyArray, ...]) -> Float[Array, ""]:
    """The Frobenius norm of an array of any shape."""
    return jnp.sqrt((x**2).sum())


def columns_of(
    matrix: Float[AnyArray, "d_in d"], x: Float[AnyArray, "n d_in"]
) -> Float[Array, "d n"]:
    """(x matrix)^T, with no copy of x turned round."""
    return jax.lax.dot_general(matrix, x, (((0,), (1,)), ((), ())), precision=PRECISION)


def pseudo_inverse(a: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """A^+, singular values below the square root of the rounding unit dropped."""
    return jnp.linalg.pinv(a, rtol=float(jnp.finfo(a.dtype).eps) ** 0.5)


def widened(x: AnyArray | float, dtype: Any) -> jax.Array:
    """x in a precision that is no less, subnormal numbers too, which a conversion may take for 0."""
    wide = jnp.asarray(x, dtype)
    narrow = jnp.result_type(x)
    if narrow == wide.dtype or not jnp.issubdtype(narrow, jnp.floating):
        return wide
    info = jnp.finfo(narrow)
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x), f"uint{info.bits}").astype(jnp.int32)
    mantissa = (bits & (2**info.nmant - 1)).astype(dtype)
    sign = jnp.where(bits >> (info.bits - 1) != 0, -1.0, 1.0).astype(dtype)
    subnormal = (bits >> info.nmant) & (2**info.nexp - 1) == 0
    return jnp.where(subnormal, sign * mantissa * float(info.smallest_subnormal), wide)
