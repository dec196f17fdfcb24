"""Which query sees which key: padding, causality, a local window, packed documents.

A mask of every pair is formed for dense methods alone. What is kept are facts about tokens
(`Tokens`) and a rule between positions (`Pattern`), from which `visible` makes the mask of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis


class Tokens(NamedTuple):
    """Facts about the tokens of one batch entry, or with a batch axis in front of all of them."""

    query: Bool[Array, "*b t"]  # which queries there are: statistics are taken over these alone
    key: Bool[Array, "*b s"]  # which keys there are
    query_document: Int[Array, "*b t"] | None = None  # which document each belongs to
    key_document: Int[Array, "*b s"] | None = None


class Pattern(NamedTuple):
    """What is known of who sees whom before anything runs."""

    group: int = 1  # queries to a token, those of one token side by side: heads that share keys
    is_causal: bool = False
    window: tuple[int, int] | None = None  # keys this far to the left and to the right are seen
    packed: bool = False  # queries and keys are the same tokens, documents are runs of them
    axis: Axis = None  # mesh axes over which tokens are split, this device holding some of them

    @property
    def is_local(self) -> bool:
        """Whether positions decide who sees whom."""
        return self.is_causal or self.window is not None

    def first(self, length: int) -> Int[Array, ""]:
        """The position of this device's first token, `length` to a device."""
        device = 0 if self.axis is None else jax.lax.axis_index(self.axis)
        return jnp.asarray(device, jnp.int32) * length


def visible(
    pattern: Pattern,
    position: Int[Array, " m"],
    at: Int[Array, " n"],
    exists: Bool[Array, " n"],
    own: Int[Array, " m"] | None,
    other: Int[Array, " n"] | None,
) -> Bool[Array, "m_or_1 n"]:
    """Which keys at positions `at` the queries at `position` see.

    exists: which of the keys there are; own, other: documents of the queries and of the keys.
    """
    position = position[:, None]
    at = at[None]
    seen = exists[None]
    if pattern.is_causal:
        seen = seen & (at <= position)
    if pattern.window is not None:
        left, right = pattern.window
        seen = seen & (at >= position - left) & (at <= position + right)
    if own is not None and other is not None:
        seen = seen & (own[:, None] == other[None])
    return seen


def sees_any(
    pattern: Pattern, tokens: Tokens, marked: Bool[Array, " s"], queries: int
) -> Bool[Array, " t"]:
    """Whether each of `queries` tokens sees a key that is marked, documents being runs. O(t + s).

    Tokens that are split over devices have no window and no documents.
    """
    length = marked.shape[0]
    if pattern.axis is not None:
        count = marked.sum(dtype=jnp.int32)
        if not pattern.is_causal:
            return jnp.full(queries, collectives.total(count, pattern.axis) > 0)
        here = jnp.cumsum(marked, dtype=jnp.int32)
        return here + collectives.before(count, pattern.axis) > 0
    position = jnp.arange(queries, dtype=jnp.int32)
    first = jnp.zeros_like(position)
    last = position if pattern.is_causal else jnp.full_like(position, length - 1)
    if pattern.window is not None:
        left, right = (min(reach, length + queries) for reach in pattern.window)
        first = jnp.maximum(first, position - left)
        last = jnp.minimum(last, position + right)
    if pattern.packed and tokens.query_document is not None:
        starts, ends = runs(tokens.query_document)
        first = jnp.maximum(first, starts)
        last = jnp.minimum(last, ends)
    before = jnp.cumsum(jnp.pad(marked, (1, 0)), dtype=jnp.int32)
    end = jnp.clip(last + 1, 0, length)
    return before[end] > before[jnp.minimum(first, end)]


def runs(document: Int[Array, " t"]) -> tuple[Int[Array, " t"], Int[Array, " t"]]:
    """(first, last) token of the run of equal numbers that each token lies in."""
    position = jnp.arange(document.shape[0], dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones_like(document[:1], bool), document[1:] != document[:-1]])
    first = jax.lax.cummax(jnp.where(new, position, 0))
    old = jnp.concatenate([document[1:] != document[:-1], jnp.ones_like(document[:1], bool)])
    last = jax.lax.cummin(jnp.where(old, position, position[-1]), reverse=True)
    return first, last


def visible_pairs(pattern: Pattern, tokens: Tokens) -> Bool[Array, "t_or_1 s"]:
    """The mask of every pair: for what is dense anyway."""
    position = jnp.arange(tokens.query.shape[0], dtype=jnp.int32)
    at = jnp.arange(tokens.key.shape[0], dtype=jnp.int32)
    own, other = tokens.query_document, tokens.key_document
    return visible(pattern, position, at, tokens.key, own, other)
