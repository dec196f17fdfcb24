"""Exact softmax attention of one key head: all keys at once, in blocks of queries, or in a band."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.linalg import dot
from lora_limits.nn.visibility import Pattern, Tokens, visible

LEAST_BAND = 128  # tokens to a block of a band, which is as wide at least


def attend(
    block: int,
    pattern: Pattern,
    tokens: Tokens,
    q: Float[Array, "n h"],
    k: Float[Array, "s h"],
    v: Float[Array, "s hv"],
) -> Float[Array, "n hv"]:
    """Outputs of queries q, `block` of them at a time, each block recomputed on the way back.

    A query that sees no key gives 0. O(n S (H + Hv)) time, O(block S) memory, derivative included.
    """
    n = q.shape[0]
    size = min(block, n)
    keys = jnp.arange(k.shape[0], dtype=jnp.int32)

    def rows(tile):
        q, i = tile
        return _softmax(q, k, v, visible(pattern, tokens, i, keys))

    index = jnp.arange(-(-n // size) * size, dtype=jnp.int32)
    if size == n:
        return rows((q, index))
    padded = jnp.pad(q, ((0, index.shape[0] - n), (0, 0)))
    return _by_block(rows, (padded, index), size)[:n]


def band(
    pattern: Pattern,
    tokens: Tokens,
    q: Float[Array, "n h"],
    k: Float[Array, "s h"],
    v: Float[Array, "s hv"],
) -> Float[Array, "n hv"]:
    """The same where queries see a window of keys: a band of f, and nothing beside it is computed.

    O(T (left + right + 128) G (H + Hv)) time, O(G (left + right + 128)^2) memory beside inputs and
    outputs, derivative included.
    """
    assert pattern.window is not None
    group = pattern.group
    length = q.shape[0] // group
    reach = max(length, k.shape[0])
    left = min(pattern.window[0], reach)
    right = 0 if pattern.is_causal else min(pattern.window[1], reach)
    size = min(max(left + right, LEAST_BAND), length)
    blocks = -(-length // size)
    # Every block then finds its keys at a fixed distance, whatever lies beyond the ends.
    behind = max(blocks * size + right - k.shape[0], 0)
    around = ((left, behind), (0, 0))
    keys = jnp.pad(k, around)
    values = jnp.pad(v, around)

    def rows(tile):
        q, i = tile
        first = i[0] // group
        k_here = jax.lax.dynamic_slice_in_dim(keys, first, left + size + right)
        v_here = jax.lax.dynamic_slice_in_dim(values, first, left + size + right)
        at = first - left + jnp.arange(left + size + right, dtype=jnp.int32)
        # A negative position would be counted from the end.
        seen = visible(pattern, tokens, i, jnp.where(at < 0, k.shape[0], at))
        return _softmax(q, k_here, v_here, seen)

    padded = jnp.pad(q, ((0, blocks * size * group - q.shape[0]), (0, 0)))
    index = jnp.arange(padded.shape[0], dtype=jnp.int32)
    return _by_block(rows, (padded, index), size * group)[: q.shape[0]]


def _by_block(rows, arrays, size: int) -> jax.Array:
    """rows of the arrays, `size` at a time, each block recomputed on the way back."""
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
    out = jax.lax.map(jax.checkpoint(rows, prevent_cse=False), blocks)
    return out.reshape(-1, out.shape[-1])


def _softmax(q, k, v, seen) -> jax.Array:
    """softmax(q k^T) v over the keys seen, 0 for a query that sees none."""
    s = dot(q, k.T)
    # Finite for a query that sees no key; -inf would leave NaN to subtract from.
    least = float(jnp.finfo(s.dtype).min)
    # The largest score cancels in the output, so its derivative is not wanted.
    top = jax.lax.stop_gradient(jnp.max(s, axis=1, keepdims=True, where=seen, initial=least))
    # Masked before exp too, so that nothing which is not seen can overflow.
    e = jnp.where(seen, jnp.exp(jnp.where(seen, s - top, 0)), 0)
    total = e.sum(1, keepdims=True)
    return dot(e, v) / jnp.where(total > 0, total, 1)
