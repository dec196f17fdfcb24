"""What full and causal polynomial attention share: blocks of tokens, evaluation, normalisation.

Arrays lie tokens last: c numbers of n tokens are (c, n).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_limits.linalg import dot
from lora_limits.polynomial import evaluation


def split(x: jax.Array, size: int) -> jax.Array:
    """(c, n) -> (blocks, c, size), zeros behind the last token."""
    blocks = -(-x.shape[1] // size)
    padded = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1])))
    return padded.reshape(x.shape[0], blocks, size).transpose(1, 0, 2)


def join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `split`: (blocks, c, size) -> (c, length)."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)[:, :length]


def with_ones(v: jax.Array) -> jax.Array:
    """[1, v]: (d_value, n) -> (1 + d_value, n)."""
    return jnp.concatenate([jnp.ones_like(v[:1]), v])


def evaluate(m: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Polynomials with coefficients m (k, c) where the features are `parts`: (c, n)."""
    top = parts[-1].shape[0]
    out = dot(m[-top:].T, parts[-1])
    return out if len(parts) == 1 else out + dot(m[:-top].T, jnp.concatenate(parts[:-1]))


def normalised(u: jax.Array) -> jax.Array:
    """u[1:] / u[0], NaN where the normaliser u[0] is not positive."""
    good = u[:1] > 0
    return jnp.where(good, u[1:] / jnp.where(good, u[:1], 1), jnp.nan)


def cotangent(gout: jax.Array, out: jax.Array, normaliser: jax.Array) -> jax.Array:
    """g (1 + d_value, n). A token that is not asked for gives 0; one that is, and has no
    normaliser, gives NaN.
    """
    good = normaliser[None] > 0
    gout = jnp.where(good | (gout == 0), gout, jnp.nan)
    rho = (gout * jnp.where(good, out, 0)).sum(0, keepdims=True)
    return jnp.concatenate([-rho, gout]) / jnp.where(good, normaliser[None], 1)


def slopes(
    lifted: evaluation.Lift, x: jax.Array, parts: list[jax.Array], z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(u (c, n), sum_c z_c grad u_c (d, n)) at tokens x (d, n), `parts` their features of degrees
    below the top one.
    """
    values = evaluation.evaluate(lifted, x, parts)
    return values.low + values.top, evaluation.slope(lifted, values, x, parts, z)


def lower(degree: int) -> int:
    """How many degrees of features `slopes` wants."""
    return max(degree, 1)
