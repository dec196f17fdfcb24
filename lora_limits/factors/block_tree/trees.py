"""Balanced trees of like tokens: halves, halves of halves, until leaves are small."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_limits.factors.factor import take
from lora_limits.linalg import PRECISION

ROUNDS = 2  # of the power iteration that finds the direction of largest spread


def halving(points: Float[Array, "n d"], levels: int, size: int) -> Int[Array, "leaves size"]:
    """Indices of points in 2^levels leaves of `size` places; those of n are padding.

    A node is halved at the median of its points along the direction of their largest spread. Like
    leaves lie side by side, so every run of 2^l of them is a node. O(n d levels) time beside
    `levels` sorts.
    """
    n = points.shape[0]
    order = jnp.arange(size << levels, dtype=jnp.int32)
    order = jnp.where(order < n, order, n)
    for level in range(levels):
        nodes = order.reshape(2**level, -1)
        along = _along(take(points, nodes), nodes < n)
        # each row is a node: its points in order, so that its halves are its children
        order = jax.lax.sort((along, nodes), dimension=1, num_keys=1)[1]
    return order.reshape(2**levels, size)


def _along(z: Float[Array, "nodes m d"], exists: jax.Array) -> Float[Array, "nodes m"]:
    """Places of the points of each node along its longest direction; padding is in the middle."""
    live = exists.astype(z.dtype)
    mean = z.sum(1) / jnp.maximum(live.sum(1), 1)[:, None]
    z = (z - mean[:, None]) * live[:, :, None]
    direction = z[:, 0] + 1e-3
    for _ in range(ROUNDS):
        along = jnp.einsum("pmd,pd->pm", z, direction, precision=PRECISION)
        direction = jnp.einsum("pmd,pm->pd", z, along, precision=PRECISION)
        top = jnp.abs(direction).max(1, keepdims=True)
        direction = direction / jnp.where(top > 0, top, 1)
    return jnp.einsum("pmd,pd->pm", z, direction, precision=PRECISION)
