"""Which query sees which key: padding, causality, a local window, packed documents.

A mask of every pair is never formed for a whole sequence. What is kept are facts about tokens
(`Tokens`) and a rule between positions (`Pattern`), from which `visible` makes the mask of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


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

    @property
    def is_local(self) -> bool:
        """Whether positions decide who sees whom."""
        return self.is_causal or self.window is not None


def visible(
    pattern: Pattern, tokens: Tokens, query: Int[Array, " m"], key: Int[Array, " n"]
) -> Bool[Array, "m_or_1 n"]:
    """Which of the keys at positions `key` the queries numbered `query` see.

    query counts group by group, so that query i is of token i // group. Numbers past the last token
    are allowed: nothing there is seen, and what a query there sees is of no use to anybody.
    """
    position = (query // pattern.group)[:, None]
    at = key[None]
    seen = _at(tokens.key, key, False)[None]
    if pattern.is_causal:
        seen = seen & (at <= position)
    if pattern.window is not None:
        left, right = pattern.window
        seen = seen & (at >= position - left) & (at <= position + right)
    if tokens.query_document is not None and tokens.key_document is not None:
        own = _at(tokens.query_document, position[:, 0], 0)[:, None]
        seen = seen & (own == _at(tokens.key_document, key, 0)[None])
    return seen


def _at(x: jax.Array, index: jax.Array, nowhere: int | bool) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=nowhere)


def sees_any(
    pattern: Pattern, tokens: Tokens, marked: Bool[Array, " s"], queries: int
) -> Bool[Array, " t"]:
    """Whether each of `queries` tokens sees a key that is marked, documents being runs. O(t + s)."""
    length = marked.shape[0]
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
