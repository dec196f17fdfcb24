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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_limits.coordinates.sweep import scan
from lora_limits.heads import block_sums as sums
from lora_limits.heads.block_sums import FIRST, LAST, Rule, Sum, Tile
from lora_limits.heads.features import (
    asked_for,
    cotangent,
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


def forward(rule: Rule, x, y, w, v, document):
    """(outputs, what `backward` keeps, whose last two are the normalisers, scaled, and outputs)."""
    return forward_with_scale(rule, x, y, w, v, document)[:2]


def forward_with_scale(rule: Rule, x, y, w, v, document):
    """`forward`, and exp(-m_i), by which the normalisers are scaled; 0 where no other block counts."""
    columns = 1 + v.shape[0]
    c = monomials.coefficients(series.taylor(rule.degree, x.dtype), y.shape[0])

    def onwards(before, tile):
        near, shrink = sums.diagonal(rule, tile, before)
        # All parts of u are scaled by exp(-m_i), which cancels in the output.
        u = sums.of_keys(c, before, tile, shrink, rule.degree) + dot(tile.one_v, near.T)
        return sums.add_keys(rule, before, tile, LAST), (u, shrink)

    def back(behind, this):
        tile, shrink = this
        u = sums.of_keys(c, behind, tile, shrink, rule.degree)
        return sums.add_keys(rule, behind, tile, FIRST), u

    tiles = sums.tiles_of(rule, x, y, w, with_ones(v), document)
    start = sums.keys_before(rule, sums.nothing(rule, columns, y, document, FIRST), tiles)
    u, shrink = scan(onwards, start, tiles)[1]
    if not rule.is_causal:
        end = sums.nothing(rule, columns, y, document, LAST)
        u = u + scan(back, end, (tiles, shrink), reverse=True)[1]
    u = join(u, x.shape[1])
    normaliser, out = u[0], normalised(u)
    scale = join(shrink, x.shape[1])[0]
    return out, (x, y, w, v, document, start, normaliser, out), scale


def _to_queries(lift, degree: int, keys: Sum, tile: Tile, g: jax.Array) -> Float[Array, "d gn"]:
    """dx of a block's queries from the keys beyond it. g: in units of exp(-m_i)."""
    parts = monomials.by_degree(tile.x, lower(degree) - 1)
    return slopes(lift(keys), tile.x, parts, sums.of_document(tile.of_queries, keys.document, g))[1]


def _to_keys(lift, degree: int, queries: Sum, tile: Tile) -> Float[Array, "d_and_1_and_dv n"]:
    """dy, the derivative in log w and dv of a block's keys from the queries beyond it."""
    w = sums.of_document(tile.document, queries.document, tile.w)
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

    def lift(side: Sum):
        return evaluation.make(c * side.total, columns, width, rule.degree)

    to_queries = functools.partial(_to_queries, lift, rule.degree)
    to_keys = functools.partial(_to_keys, lift, rule.degree)

    def onwards(before, this):
        keys, queries = before
        tile, g = this
        near, shrink = sums.diagonal(rule, tile, keys)
        p = near * dot(g.T, tile.one_v)
        # every key's row of p summed is the derivative in its log-weight
        near_keys = jnp.concatenate([dot(tile.x, p), down(p), dot(g[1:], near)])
        # D was kept scaled by exp(-m_i), so g is right for the diagonal and too large beyond it.
        g = g * shrink
        dx = to_queries(keys, tile, g) + dot(tile.y, p.T)
        keys = sums.add_keys(rule, keys, tile, LAST)
        if queries is None:
            return (keys, None), (dx, near_keys, g)
        near_keys = near_keys + to_keys(queries, tile)
        return (keys, sums.add_queries(rule, queries, tile, g, LAST)), (dx, near_keys, g)

    def back(behind, this):
        keys, queries = behind
        tile, g = this
        found = to_keys(queries, tile)
        queries = sums.add_queries(rule, queries, tile, g, FIRST)
        if keys is None:
            return (None, queries), (found, None)
        dx = to_queries(keys, tile, g)
        return (sums.add_keys(rule, keys, tile, FIRST), queries), (found, dx)

    tiles = sums.tiles_of(rule, x, y, w, with_ones(v), document)
    g = split(cotangent(gout, out, normaliser), tiles.x.shape[2])
    # Later keys, and earlier queries of theirs, are nobody's where all is causal.
    first, last = (sums.nothing(rule, columns, y, document, at) for at in (FIRST, LAST))
    begin = start, None if rule.is_causal else first
    dx, keys, g = scan(onwards, begin, (tiles, g))[1]
    end = None if rule.is_causal else last, sums.queries_behind(rule, last, tiles, g)
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
