"""The sums that attention in blocks of tokens is made of: over one document, on one side of a block.

M of the keys and T of the queries of polynomial_blocks.py, and a block's own scores. A sum starts
anew where a document does. Where tokens are split over devices, it begins with what lies on the
devices before, or behind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.sweep import scan
from lora_limits.heads.features import evaluate, join, split
from lora_limits.heads.visibility import runs
from lora_limits.linalg import dot
from lora_limits.polynomial import monomials

FIRST, LAST = 0, -1  # a token of a block: the one that is next to the blocks before, or behind


class Rule(NamedTuple):
    """What is known of the sums before anything runs."""

    block: int  # tokens to a block
    degree: int
    is_causal: bool
    axis: Axis = None  # causal alone, and one document


class Tile(NamedTuple):
    """A block of tokens, or all of them: what the scans run over."""

    x: Float[Array, "*blocks d gn"]
    y: Float[Array, "*blocks d n"]
    w: Float[Array, "*blocks 1 n"]
    one_v: Float[Array, "*blocks dv_and_1 n"]
    document: Int[Array, "*blocks 1 n"] | None  # None where all tokens are of one
    keys: Int[Array, "*blocks 1 n"] | None  # keys that the document of each token has

    @property
    def of_queries(self) -> Int[Array, "1 gn"] | None:
        """The document of each query."""
        return None if self.document is None else self.for_queries(self.document)

    def for_queries(self, of_tokens: Int[Array, "1 n"]) -> Int[Array, "1 gn"]:
        """What is known of each token, of each of its queries."""
        return jnp.repeat(of_tokens, self.x.shape[1] // self.y.shape[1], axis=1)

    def end(self, at: int) -> Int[Array, ""] | None:
        """The document of the first or the last token."""
        return None if self.document is None else self.document[0, at]


class Sum(NamedTuple):
    """Features summed over tokens of one document, on one side of a block."""

    total: Float[Array, "k c"]
    document: Int[Array, ""] | None

    def plus(self, more: Float[Array, "k c"], document: Int[Array, ""] | None) -> Sum:
        """With `more` of a document, the same one or another that takes its place."""
        return Sum(of_document(self.document, document, self.total) + more, document)


def of_document(documents: Any, document: Any, x: jax.Array) -> jax.Array:
    """x where `documents` are the one asked for, 0 elsewhere; x where there are no documents."""
    return x if documents is None else jnp.where(documents == document, x, 0)


def diagonal(
    rule: Rule, tile: Tile, before: Sum
) -> tuple[Float[Array, "gn n"], Float[Array, "1 gn"]]:
    """(w_j exp(x_i . y_j - m_i) for j that i sees, else 0; exp(-m_i), 0 for queries that see no other
    block).

    m_i is the largest exponent, and 0 at least where other blocks are seen: neither these nor, where
    there are none, the query's own block can then over- or underflow as a whole.
    """
    x, y = tile.x, tile.y
    allowed = jnp.broadcast_to(tile.w > 0, (x.shape[1], y.shape[1]))
    if rule.is_causal:
        token = np.arange(x.shape[1]) // (x.shape[1] // y.shape[1])
        allowed = allowed & jnp.asarray(token[:, None] >= np.arange(y.shape[1])[None])
    of_queries = tile.of_queries
    if of_queries is not None:
        allowed = allowed & (tile.document == of_queries.T)
    s = dot(x.T, y)
    least = float(jnp.finfo(s.dtype).min)
    if rule.is_causal:
        # the first feature and the first column are ones: the sum of the weights before
        weights = jnp.broadcast_to(before.total[0, 0], (1, x.shape[1]))
        further = of_document(of_queries, before.document, weights) > 0
    elif tile.keys is not None:
        further = tile.for_queries(tile.keys) > allowed.sum(1, dtype=jnp.int32)[None]
    else:
        further = jnp.ones((1, x.shape[1]), bool)
    top = jnp.max(s, axis=1, keepdims=True, where=allowed, initial=least)
    top = jnp.where(further.T, jnp.maximum(top, 0), top)
    # Later tokens are masked before exp too, so that none of them can overflow.
    exponents = jnp.where(allowed, s - top, 0)
    near = jnp.where(allowed, tile.w * jnp.exp(exponents), 0)
    return near, jnp.exp(jnp.where(further, -top.T, least))


def tiles_of(rule: Rule, x, y, w, one_v, document) -> Tile:
    """The blocks of all tokens."""
    group = x.shape[1] // y.shape[1]
    size = min(rule.block, y.shape[1])
    exists = (w > 0).astype(jnp.int32)
    y, w, one_v = (split(z, size) for z in (y, w[None], one_v))
    x = split(x, size * group)
    if document is None:
        return Tile(x, y, w, one_v, None, None)
    first, last = runs(document)
    count = jnp.cumsum(exists)
    keys = count[last] - count[first] + exists[first]
    return Tile(x, y, w, one_v, split(document[None], size), split(keys[None], size))


def nothing(rule: Rule, columns: int, x: jax.Array, document: Any, at: int) -> Sum:
    """A sum over no tokens yet, of the document of the first or the last token."""
    one = None if document is None else document[at]
    return Sum(jnp.zeros((monomials.count(x.shape[0], rule.degree), columns), x.dtype), one)


def add_keys(rule: Rule, keys: Sum, tile: Tile, at: int) -> Sum:
    """M with the keys of the document that goes on beyond this block."""
    document = tile.end(at)
    z = tile.one_v * of_document(tile.document, document, tile.w)
    return keys.plus(monomials.products(monomials.by_degree(tile.y, rule.degree), z), document)


def add_queries(rule: Rule, queries: Sum, tile: Tile, g: jax.Array, at: int) -> Sum:
    """T with the queries of the document that goes on beyond this block."""
    document = tile.end(at)
    g = of_document(tile.of_queries, document, g)
    return queries.plus(monomials.products(monomials.by_degree(tile.x, rule.degree), g), document)


def keys_before(rule: Rule, start: Sum, tiles: Tile) -> Sum:
    """M of the tokens before this device's first."""
    if rule.axis is None:
        return start
    own = scan(lambda keys, tile: (add_keys(rule, keys, tile, LAST), None), start, tiles)[0]
    return Sum(collectives.before(own.total, rule.axis), None)


def queries_behind(rule: Rule, end: Sum, tiles: Tile, g: jax.Array) -> Sum:
    """T of the tokens behind this device's last."""
    if rule.axis is None:
        return end

    def add(queries, this):
        tile, g = this
        return add_queries(rule, queries, tile, g, FIRST), None

    own = scan(add, end, (tiles, g))[0]
    return Sum(collectives.after(own.total, rule.axis), None)


def of_keys(c: jax.Array, keys: Sum, tile: Tile, shrink: jax.Array, degree: int) -> jax.Array:
    """[D, D out] of a block's queries from the keys beyond it, scaled by exp(-m_i)."""
    shrink = of_document(tile.of_queries, keys.document, shrink)
    return evaluate(c * keys.total, monomials.by_degree(tile.x, degree)) * shrink


def beyond(
    rule: Rule,
    c: Float[Array, " g_and_1"],
    x: Float[Array, "d gt"],
    y: Float[Array, "d t"],
    w: Float[Array, " t"],
    z: Float[Array, "c t"],
    document: Int[Array, " t"] | None,
) -> Float[Array, "c gt"]:
    """sum_j w_j P(s_ij) z_j over the keys that a query sees outside of its own block.

    P by its coefficients c, of any degree. O(T G k c) time, O((k + T) c + block k) memory.
    """
    rule = rule._replace(degree=c.shape[0] - 1)
    coefficients = monomials.coefficients(c, y.shape[0])

    def visit(keys, tile, at):
        found = of_keys(coefficients, keys, tile, jnp.ones_like(tile.x[:1]), rule.degree)
        return add_keys(rule, keys, tile, at), found

    tiles = tiles_of(rule, x, y, w, z, document)
    start = nothing(rule, z.shape[0], y, document, FIRST)
    out = scan(lambda keys, tile: visit(keys, tile, LAST), start, tiles)[1]
    if not rule.is_causal:
        end = nothing(rule, z.shape[0], y, document, LAST)
        out = out + scan(lambda keys, tile: visit(keys, tile, FIRST), end, tiles, reverse=True)[1]
    return join(out, x.shape[1])
