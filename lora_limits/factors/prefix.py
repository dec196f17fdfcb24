"""Causal sums of a low-rank factor: of every query over the keys up to its own, in linear time.

    out_i = sum_{j <= i} <a_i, b_j> <c_i, h_j> z_j

by blocks of tokens: what lies in blocks before through sums of b (x) h (x) z, k m n numbers, the
block's own pairs one by one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.coordinates.sweep import scan
from lora_limits.linalg import dot

BLOCK = 128


def prefix_kernel(
    a: Float[Array, "n k"],
    c: Float[Array, "n m"],
    b: Float[Array, "n k"],
    h: Float[Array, "n m"],
    z: Float[Array, "n columns"],
    *,
    reverse: bool = False,
) -> Float[Array, "n columns"]:
    """The sum above; over the tokens from i on if `reverse`.

    O(n (k m columns + BLOCK (k + m + columns))) time, O(k m columns) memory beside the tokens.
    """
    n = z.shape[0]
    size = min(BLOCK, n)
    m, columns = c.shape[1], z.shape[1]
    own = jnp.tri(size, dtype=bool)
    own = own.T if reverse else own
    # a sum over a short axis is slow, a product is not
    ones = jnp.tile(jnp.eye(columns, dtype=z.dtype), (m, 1))

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -n % size), (0, 0))).reshape(-1, size, x.shape[1])

    def step(moments, tile):
        a, c, b, h, z = tile
        near = jnp.where(own, dot(a, b.T) * dot(c, h.T), 0)
        far = dot(dot(a, moments) * jnp.repeat(c, columns, axis=1), ones)
        both = (h[:, :, None] * z[:, None, :]).reshape(size, -1)
        return moments + dot(b.T, both), dot(near, z) + far

    start = jnp.zeros((a.shape[1], m * columns), z.dtype)
    tiles = tuple(split(x) for x in (a, c, b, h, z))
    out = scan(step, start, tiles, reverse=reverse)[1]
    return out.reshape(-1, columns)[:n]


def prefix_sums(
    a: Float[Array, "n k"], b: Float[Array, "n k"], z: Float[Array, "n columns"], **options: bool
) -> Float[Array, "n columns"]:
    """The same without c and h."""
    one = jnp.ones_like(a, shape=(a.shape[0], 1))
    return prefix_kernel(a, one, b, one, z, **options)
