"""Attention in linear time where places decide who sees whom: causal, packed documents, or both.

A query's own block is exact, the other blocks are seen through k features. One key head: x (d, T G)
queries, those of one token side by side, y (d, T) keys, w (T,) weights, 0 where a key does not
exist, v (d_value, T); psi, C, phi and P (Taylor) as in gradients/sweeps.py. For a query i of block b:

    [D_i, D_i out_i] = psi(x_i) C M_b + sum_{j in b, seen} w_j exp(x_i . y_j) [1, v_j],
    M_b = sum_{j in blocks before b} w_j phi(y_j) [1, v_j]

and, where queries see later keys too, the same of the blocks after b. Backward, with
g_i = [-<gout_i, out_i>, gout_i] / D_i, M_b is built again for dx, and T_b = sum psi(x_i) g_i of the
queries in the blocks that see b for dy and dv. One scan goes through the blocks in order and knows
what lies before, one goes back and knows what lies behind. What is kept for the way back is the
inputs, D and the output. Nothing is centred or fitted here: `head` must not look at tokens yet to
come. Weights are for a gradient, which sees them all.

Documents are runs of tokens. One that a block shares with the block before is the last there and
the first here, so that a sum need only hold the tokens of one: it starts anew where a document does.

Where tokens are split over devices (`axis`), each begins with the M of the devices before it and,
on the way back, with the T of those behind it: both are gathered once, whatever the length. Devices
work side by side, so they first sum over their own tokens, which takes a sweep more each way.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.sweep import scan
from lora_limits.heads.features import (
    asked_for,
    cotangent,
    evaluate,
    join,
    lower,
    normalised,
    slopes,
    split,
    with_ones,
)
from lora_limits.heads.visibility import Pattern, Tokens
from lora_limits.linalg import dot, down
from lora_limits.polynomial import evaluation, monomials, series

FIRST, LAST = 0, -1  # a token of a block: the one that is next to the blocks before, or behind


class Rule(NamedTuple):
    """What is known of the sums before anything runs."""

    block: int  # tokens to a block
    degree: int
    is_causal: bool
    axis: Axis = None  # causal alone, and one document


class _Tile(NamedTuple):
    """A block of tokens, or all of them: what the scans run over."""

    x: Float[Array, "*blocks d gn"]
    y: Float[Array, "*blocks d n"]
    w: Float[Array, "*blocks 1 n"]
    one_v: Float[Array, "*blocks dv_and_1 n"]
    document: Int[Array, "*blocks 1 n"] | None  # None where all tokens are of one

    @property
    def of_queries(self) -> Int[Array, "1 gn"] | None:
        """The document of each query."""
        if self.document is None:
            return None
        return jnp.repeat(self.document, self.x.shape[1] // self.y.shape[1], axis=1)

    def end(self, at: int) -> Int[Array, ""] | None:
        """The document of the first or the last token."""
        return None if self.document is None else self.document[0, at]


class _Sum(NamedTuple):
    """Features summed over tokens of one document, on one side of a block."""

    total: Float[Array, "k c"]
    document: Int[Array, ""] | None

    def plus(self, more: Float[Array, "k c"], document: Int[Array, ""] | None) -> _Sum:
        """With `more` of a document, the same one or another that takes its place."""
        return _Sum(_of(self.document, document, self.total) + more, document)


def _of(documents: Any, document: Any, x: jax.Array) -> jax.Array:
    """x where `documents` are the one asked for, 0 elsewhere; x where there are no documents."""
    return x if documents is None else jnp.where(documents == document, x, 0)


def _diagonal(
    rule: Rule, tile: _Tile, before: _Sum
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
        further = _of(of_queries, before.document, weights) > 0
    else:
        further = jnp.ones((1, x.shape[1]), bool)
    top = jnp.max(s, axis=1, keepdims=True, where=allowed, initial=least)
    top = jnp.where(further.T, jnp.maximum(top, 0), top)
    # Later tokens are masked before exp too, so that none of them can overflow.
    exponents = jnp.where(allowed, s - top, 0)
    near = jnp.where(allowed, tile.w * jnp.exp(exponents), 0)
    return near, jnp.exp(jnp.where(further, -top.T, least))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    rule: Rule,
    x: Float[Array, "d gt"],
    y: Float[Array, "d t"],
    w: Float[Array, " t"],
    v: Float[Array, "dv t"],
    document: Int[Array, " t"] | None,
) -> Float[Array, "dv gt"]:
    """Outputs of the queries x. document: runs, numbered upwards.

    O(T G (k (1 + d_value) + block (d + d_value))) time, O(k (1 + d_value) + G block (k + block))
    memory besides inputs and outputs. NaN where the normaliser is not positive. The derivative in w
    is taken to be 0.
    """
    return forward(rule, x, y, w, v, document)[0]


def _tiles(rule: Rule, x, y, w, one_v, document) -> _Tile:
    """The blocks of all tokens."""
    group = x.shape[1] // y.shape[1]
    size = min(rule.block, y.shape[1])
    y, w, one_v = (split(z, size) for z in (y, w[None], one_v))
    documents = None if document is None else split(document[None], size)
    return _Tile(split(x, size * group), y, w, one_v, documents)


def _nothing(rule: Rule, columns: int, x: jax.Array, document: Any, at: int) -> _Sum:
    one = None if document is None else document[at]
    return _Sum(jnp.zeros((monomials.count(x.shape[0], rule.degree), columns), x.dtype), one)


def _add_keys(rule: Rule, keys: _Sum, tile: _Tile, at: int) -> _Sum:
    """M with the keys of the document that goes on beyond this block."""
    document = tile.end(at)
    z = tile.one_v * _of(tile.document, document, tile.w)
    return keys.plus(monomials.products(monomials.by_degree(tile.y, rule.degree), z), document)


def _add_queries(rule: Rule, queries: _Sum, tile: _Tile, g: jax.Array, at: int) -> _Sum:
    """T with the queries of the document that goes on beyond this block."""
    document = tile.end(at)
    g = _of(tile.of_queries, document, g)
    return queries.plus(monomials.products(monomials.by_degree(tile.x, rule.degree), g), document)


def _keys_before(rule: Rule, start: _Sum, tiles: _Tile) -> _Sum:
    """M of the tokens before this device's first."""
    if rule.axis is None:
        return start
    own = scan(lambda keys, tile: (_add_keys(rule, keys, tile, LAST), None), start, tiles)[0]
    return _Sum(collectives.before(own.total, rule.axis), None)


def _queries_behind(rule: Rule, end: _Sum, tiles: _Tile, g: jax.Array) -> _Sum:
    """T of the tokens behind this device's last."""
    if rule.axis is None:
        return end

    def add(queries, this):
        tile, g = this
        return _add_queries(rule, queries, tile, g, FIRST), None

    own = scan(add, end, (tiles, g))[0]
    return _Sum(collectives.after(own.total, rule.axis), None)


def _of_keys(c: jax.Array, keys: _Sum, tile: _Tile, shrink: jax.Array, degree: int) -> jax.Array:
    """[D, D out] of a block's queries from the keys beyond it, scaled by exp(-m_i)."""
    shrink = _of(tile.of_queries, keys.document, shrink)
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
        found = _of_keys(coefficients, keys, tile, jnp.ones_like(tile.x[:1]), rule.degree)
        return _add_keys(rule, keys, tile, at), found

    tiles = _tiles(rule, x, y, w, z, document)
    start = _nothing(rule, z.shape[0], y, document, FIRST)
    out = scan(lambda keys, tile: visit(keys, tile, LAST), start, tiles)[1]
    if not rule.is_causal:
        end = _nothing(rule, z.shape[0], y, document, LAST)
        out = out + scan(lambda keys, tile: visit(keys, tile, FIRST), end, tiles, reverse=True)[1]
    return join(out, x.shape[1])


def forward(rule: Rule, x, y, w, v, document):
    """(outputs, what `backward` keeps, whose last two are the normalisers, scaled, and outputs)."""
    return forward_with_scale(rule, x, y, w, v, document)[:2]


def forward_with_scale(rule: Rule, x, y, w, v, document):
    """`forward`, and exp(-m_i), by which the normalisers are scaled; 0 where no other block counts."""
    columns = 1 + v.shape[0]
    c = monomials.coefficients(series.taylor(rule.degree, x.dtype), y.shape[0])

    def onwards(before, tile):
        near, shrink = _diagonal(rule, tile, before)
        # All parts of u are scaled by exp(-m_i), which cancels in the output.
        u = _of_keys(c, before, tile, shrink, rule.degree) + dot(tile.one_v, near.T)
        return _add_keys(rule, before, tile, LAST), (u, shrink)

    def back(behind, this):
        tile, shrink = this
        u = _of_keys(c, behind, tile, shrink, rule.degree)
        return _add_keys(rule, behind, tile, FIRST), u

    tiles = _tiles(rule, x, y, w, with_ones(v), document)
    start = _keys_before(rule, _nothing(rule, columns, y, document, FIRST), tiles)
    u, shrink = scan(onwards, start, tiles)[1]
    if not rule.is_causal:
        end = _nothing(rule, columns, y, document, LAST)
        u = u + scan(back, end, (tiles, shrink), reverse=True)[1]
    u = join(u, x.shape[1])
    normaliser, out = u[0], normalised(u)
    scale = join(shrink, x.shape[1])[0]
    return out, (x, y, w, v, document, start, normaliser, out), scale


def _to_queries(lift, degree: int, keys: _Sum, tile: _Tile, g: jax.Array) -> Float[Array, "d gn"]:
    """dx of a block's queries from the keys beyond it. g: in units of exp(-m_i)."""
    parts = monomials.by_degree(tile.x, lower(degree) - 1)
    return slopes(lift(keys), tile.x, parts, _of(tile.of_queries, keys.document, g))[1]


def _to_keys(lift, degree: int, queries: _Sum, tile: _Tile) -> Float[Array, "d_and_1_and_dv n"]:
    """dy, the derivative in log w and dv of a block's keys from the queries beyond it."""
    w = _of(tile.document, queries.document, tile.w)
    parts = monomials.by_degree(tile.y, lower(degree) - 1)
    u, dy = slopes(lift(queries), tile.y, parts, tile.one_v * w)
    return jnp.concatenate([dy, down(u * tile.one_v) * w, u[1:] * w])


def backward(rule: Rule, kept, gout):
    """(dx, dy, derivative in log w, dv) from the cotangent of the outputs."""
    x, y, w, v, document, start, normaliser, out = kept
    x, out, normaliser = asked_for(gout, x, out, normaliser)
    width = y.shape[0]
    columns = 1 + v.shape[0]
    c = monomials.coefficients(series.taylor(rule.degree, x.dtype), width)

    def lift(side: _Sum):
        return evaluation.make(c * side.total, columns, width, rule.degree)

    to_queries = functools.partial(_to_queries, lift, rule.degree)
    to_keys = functools.partial(_to_keys, lift, rule.degree)

    def onwards(before, this):
        keys, queries = before
        tile, g = this
        near, shrink = _diagonal(rule, tile, keys)
        p = near * dot(g.T, tile.one_v)
        # every key's row of p summed is the derivative in its log-weight
        near_keys = jnp.concatenate([dot(tile.x, p), down(p), dot(g[1:], near)])
        # D was kept scaled by exp(-m_i), so g is right for the diagonal and too large beyond it.
        g = g * shrink
        dx = to_queries(keys, tile, g) + dot(tile.y, p.T)
        keys = _add_keys(rule, keys, tile, LAST)
        if queries is None:
            return (keys, None), (dx, near_keys, g)
        near_keys = near_keys + to_keys(queries, tile)
        return (keys, _add_queries(rule, queries, tile, g, LAST)), (dx, near_keys, g)

    def back(behind, this):
        keys, queries = behind
        tile, g = this
        found = to_keys(queries, tile)
        queries = _add_queries(rule, queries, tile, g, FIRST)
        if keys is None:
            return (None, queries), (found, None)
        dx = to_queries(keys, tile, g)
        return (_add_keys(rule, keys, tile, FIRST), queries), (found, dx)

    tiles = _tiles(rule, x, y, w, with_ones(v), document)
    g = split(cotangent(gout, out, normaliser), tiles.x.shape[2])
    # Later keys, and earlier queries of theirs, are nobody's where all is causal.
    first, last = (_nothing(rule, columns, y, document, at) for at in (FIRST, LAST))
    begin = start, None if rule.is_causal else first
    dx, keys, g = scan(onwards, begin, (tiles, g))[1]
    end = None if rule.is_causal else last, _queries_behind(rule, last, tiles, g)
    more_keys, more_dx = scan(back, end, (tiles, g), reverse=True)[1]
    dx = dx if more_dx is None else dx + more_dx
    keys = join(keys + more_keys, y.shape[1])
    return join(dx, x.shape[1]), keys[:width], keys[width], keys[width + 1 :]


def _attend_backward(rule, kept, gout):
    dx, dy, dlog_w, dv = backward(rule, kept, gout)
    return dx, dy, jnp.zeros_like(dlog_w), dv, None


attend.defvjp(forward, _attend_backward)


def head(
    degree: int,
    block: int,
    pattern: Pattern,
    tokens: Tokens,
    q: Float[Array, "n d"],
    k: Float[Array, "t d"],
    v: Float[Array, "t dv"],
) -> Float[Array, "n dv"]:
    """Outputs of one key head, `block` tokens to a block, by Taylor's polynomial."""
    # Features lie tokens last, models tokens first.
    exists = tokens.key.astype(q.dtype)
    rule = Rule(block, degree, pattern.is_causal, pattern.axis)
    out: Any = attend(rule, q.T, k.T, exists, v.T, tokens.query_document)
    return out.T
