"""Exact softmax attention of one key head: all keys at once, in blocks of queries, or in a band."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.coordinates import collectives
from lora_limits.heads.visibility import Pattern, Tokens, visible
from lora_limits.linalg import dot

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
    Where tokens are split over devices, the keys and values of all come to each.
    """
    gathered = functools.partial(collectives.gathered, axis=pattern.axis)
    k, v = gathered(k), gathered(v)
    tokens = tokens._replace(key=gathered(tokens.key))
    n = q.shape[0]
    size = min(block, n)
    at = jnp.arange(k.shape[0], dtype=jnp.int32)

    def rows(tile):
        q, position, own = tile
        seen = visible(pattern, position, at, tokens.key, own, tokens.key_document)
        return _softmax(q, k, v, seen)

    tile = _queries(pattern, tokens, q)
    if size == n:
        return rows(tile)
    return _by_block(rows, tile, size)


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
    # Every block then finds its keys at a fixed distance, whatever lies beyond the ends.
    behind = max(-(-length // size) * size + right - k.shape[0], 0)
    around = jax.tree.map(
        functools.partial(_pad, before=left, behind=behind), (k, v, tokens.key, tokens.key_document)
    )

    def rows(tile):
        q, position, own = tile
        first = position[0]
        k, v, exists, other = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, left + size + right), around
        )
        at = first - left + jnp.arange(left + size + right, dtype=jnp.int32)
        return _softmax(q, k, v, visible(pattern, position, at, exists, own, other))

    return _by_block(rows, _queries(pattern, tokens, q), size * group)


def _queries(pattern: Pattern, tokens: Tokens, q: jax.Array):
    """(q, the positions of its queries, their documents or None)."""
    position = jnp.arange(q.shape[0], dtype=jnp.int32) // pattern.group
    position = position + pattern.first(q.shape[0] // pattern.group)
    own = tokens.query_document
    return q, position, None if own is None else jnp.repeat(own, pattern.group)


def _pad(x: jax.Array, before: int, behind: int) -> jax.Array:
    """Zeros around the first axis."""
    return jnp.pad(x, [(before, behind)] + [(0, 0)] * (x.ndim - 1))


def _by_block(rows, tile, size: int) -> jax.Array:
    """rows of the queries in tile, `size` at a time, each block recomputed on the way back."""
    n = tile[0].shape[0]
    blocks = jax.tree.map(lambda x: _pad(x, 0, -n % size).reshape(-1, size, *x.shape[1:]), tile)
    out = jax.lax.map(jax.checkpoint(rows, prevent_cse=False), blocks)
    return out.reshape(-1, out.shape[-1])[:n]


def _softmax(q, k, v, seen) -> jax.Array:
    """softmax(q k^T) v over the keys seen, 0 for a query that sees none."""
    s = dot(q, k.T)
    # Finite, as -inf less -inf would be NaN; exp of what is left of it is 0 all the same.
    least = float(jnp.finfo(s.dtype).min)
    s = jnp.where(seen, s, least)
    # The largest score cancels in the output, so its derivative is not wanted.
    top = jax.lax.stop_gradient(jnp.max(s, axis=1, keepdims=True))
    e = jnp.exp(s - top)
    return jnp.where(top > least, dot(e, v) / e.sum(1, keepdims=True), 0)
