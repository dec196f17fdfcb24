"""The change of coordinates that gives queries and keys the same second moments."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.linalg import dot


def _sqrt_and_inverse(m: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = jnp.linalg.eigh(m)
    root = jnp.sqrt(jnp.maximum(values, jnp.finfo(m.dtype).tiny))
    return dot(vectors * root[None], vectors.T), dot(vectors / root[None], vectors.T)


def _normalised(m: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, ""]]:
    """(m over its trace, with a ridge of 1e-3; the trace). The identity where the trace is useless."""
    d = m.shape[0]
    eye = jnp.eye(d, dtype=m.dtype)
    trace = jnp.trace(m)
    usable = jnp.isfinite(trace) & (trace > jnp.finfo(m.dtype).tiny * 1e8)
    trace = jnp.where(usable, trace, 1)
    return jnp.where(usable, m, eye / d) / trace + 1e-3 / d * eye, trace


def balance(
    sx: Float[Array, "d d"], sy: Float[Array, "d d"]
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """(N, N^-T), symmetric, with N sy N = N^-1 sx N^-1 = their common second moment.

    N^2 is the geometric mean sy^-1 # sx. Both moments get a ridge of 1e-3 of their trace, so the
    condition number of N stays below about 30 and the change of coordinates costs no accuracy,
    whatever the rank of the inputs. sx, sy: positive semi-definite.
    """
    sx, tx = _normalised(sx)
    sy, ty = _normalised(sy)
    root, inverse = _sqrt_and_inverse(sy)
    middle, _ = _sqrt_and_inverse(dot(dot(root, sx), root))
    n, n_inverse = _sqrt_and_inverse(dot(dot(inverse, middle), inverse))
    scale = (tx / ty) ** 0.25
    return n * scale, n_inverse / scale
