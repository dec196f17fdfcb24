"""Causal attention in linear time: a query's own block exactly, the blocks before by k features.

One key head: x (d, T G) queries, those of one token side by side, y (d, T) keys, w (T,) weights,
0 where a key does not exist, v (d_value, T); psi, C, phi and P (Taylor) as in gradients/sweeps.py.
For a query i of block b:

    [D_i, D_i out_i] = psi(x_i) C M_{<b} + sum_{j <= i in b} w_j exp(x_i . y_j) [1, v_j],
    M_{<b} = sum_{j in blocks before b} w_j phi(y_j) [1, v_j]

Backward, with g_i = [-<gout_i, out_i>, gout_i] / D_i, M_{<b} is built again, in order, for dx; and
then from the last block to the first T_{>b} = sum_{i in blocks after b} psi(x_i) g_i, for dy and
dv. What is kept for the way back is the inputs, D and the output. Nothing is centred or fitted
here: `head` must not look at tokens yet to come. Weights are for a gradient, which sees them all.

Documents are runs of tokens. One that a block shares with the block before is the last there and
the first here, so that M need only hold the keys of one: it starts anew where a document does.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
from lora_limits.heads.visibility import Tokens
from lora_limits.linalg import dot, down
from lora_limits.polynomial import evaluation, monomials, series


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


def _diagonal(tile: _Tile, before: _Sum) -> tuple[Float[Array, "gn n"], Float[Array, "1 gn"]]:
    """(w_j exp(x_i . y_j - m_i) for j <= i, else 0; exp(-m_i), 0 for queries that see no block before).

    m_i is the largest exponent, and 0 at least where blocks before are seen: neither these nor, where
    there are none, the query's own block can then over- or underflow as a whole.
    """
    x, y = tile.x, tile.y
    group = x.shape[1] // y.shape[1]
    token = np.arange(x.shape[1]) // group
    not_later = token[:, None] >= np.arange(y.shape[1])[None]
    allowed = jnp.asarray(not_later) & (tile.w > 0)
    of_queries = tile.of_queries
    if of_queries is not None:
        allowed = allowed & (tile.document == of_queries.T)
    s = dot(x.T, y)
    least = float(jnp.finfo(s.dtype).min)
    # the first feature and the first column are ones: the sum of the weights before
    weights = jnp.broadcast_to(before.total[0, 0], (1, x.shape[1]))
    further = _of(of_queries, before.document, weights) > 0
    top = jnp.max(s, axis=1, keepdims=True, where=allowed, initial=least)
    top = jnp.where(further.T, jnp.maximum(top, 0), top)
    # Later tokens are masked before exp too, so that none of them can overflow.
    exponents = jnp.where(allowed, s - top, 0)
    return jnp.where(allowed, tile.w * jnp.exp(exponents), 0), jnp.exp(
        jnp.where(further, -top.T, least)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    block: int,
    degree: int,
    x: Float[Array, "d gt"],
    y: Float[Array, "d t"],
    w: Float[Array, " t"],
    v: Float[Array, "dv t"],
    document: Int[Array, " t"] | None,
) -> Float[Array, "dv gt"]:
    """Outputs of the queries x, `block` tokens to a block. document: runs, numbered upwards.

    O(T G (k (1 + d_value) + block (d + d_value))) time, O(k (1 + d_value) + G block (k + block))
    memory besides inputs and outputs. NaN where the normaliser is not positive. The derivative in w
    is taken to be 0.
    """
    return forward(block, degree, x, y, w, v, document)[0]


def _tiles(block, x, y, w, v, document) -> _Tile:
    """The blocks of all tokens."""
    group = x.shape[1] // y.shape[1]
    size = min(block, y.shape[1])
    y, w, one_v = (split(z, size) for z in (y, w[None], with_ones(v)))
    documents = None if document is None else split(document[None], size)
    return _Tile(split(x, size * group), y, w, one_v, documents)


def _add_keys(before: _Sum, tile: _Tile, degree: int) -> _Sum:
    """M of the document that goes on behind this block."""
    last = tile.end(-1)
    z = tile.one_v * _of(tile.document, last, tile.w)
    return before.plus(monomials.products(monomials.by_degree(tile.y, degree), z), last)


def _nothing(c, columns: int, document: Int[Array, " t"] | None, at: int) -> _Sum:
    one = None if document is None else document[at]
    return _Sum(jnp.zeros((c.shape[0], columns), c.dtype), one)


def forward(block, degree, x, y, w, v, document):
    """(outputs, what `backward` keeps, whose last two are the normalisers, scaled, and outputs)."""
    width = y.shape[0]
    columns = 1 + v.shape[0]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)

    def visit(before, tile):
        # Both parts of u are scaled by exp(-m_i), which cancels in the output.
        near, shrink = _diagonal(tile, before)
        far = evaluate(c * before.total, monomials.by_degree(tile.x, degree)) * shrink
        u = far + dot(tile.one_v, near.T)
        return _add_keys(before, tile, degree), jnp.concatenate([u[:1], normalised(u)])

    start = _nothing(c, columns, document, 0)
    both = scan(visit, start, _tiles(block, x, y, w, v, document))[1]
    both = join(both, x.shape[1])
    normaliser, out = both[0], both[1:]
    return out, (x, y, w, v, document, normaliser, out)


def backward(block, degree, kept, gout):
    """(dx, dy, derivative in log w, dv) from the cotangent of the outputs."""
    x, y, w, v, document, normaliser, out = kept
    x, out, normaliser = asked_for(gout, x, out, normaliser)
    width = y.shape[0]
    columns = 1 + v.shape[0]
    group = x.shape[1] // y.shape[1]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)
    tiles = _tiles(block, x, y, w, v, document)

    def earlier_keys(before, this):
        tile, g = this
        # D was kept scaled by exp(-m_i), so g is right for the diagonal and too large beyond it.
        near, shrink = _diagonal(tile, before)
        far = g * shrink
        p = near * dot(g.T, tile.one_v)
        lifted = evaluation.make(c * before.total, columns, width, degree)
        parts = monomials.by_degree(tile.x, lower(degree) - 1)
        dx = slopes(lifted, tile.x, parts, far)[1] + dot(tile.y, p.T)
        # every key's row of p summed is the derivative in its log-weight
        near_keys = jnp.concatenate([dot(tile.x, p), down(p), dot(g[1:], near)])
        return _add_keys(before, tile, degree), (dx, far, near_keys)

    def later_queries(after, this):
        tile, far = this
        back = evaluation.make(c * after.total, columns, width, degree)
        w = _of(tile.document, after.document, tile.w)
        parts = monomials.by_degree(tile.y, lower(degree) - 1)
        u, dy = slopes(back, tile.y, parts, tile.one_v * w)
        more = monomials.products(monomials.by_degree(tile.x, degree), far)
        # Of the queries here, those of the first document alone see keys of earlier blocks.
        return after.plus(more, tile.end(0)), jnp.concatenate(
            [dy, down(u * tile.one_v) * w, u[1:] * w]
        )

    g = split(cotangent(gout, out, normaliser), tiles.y.shape[2] * group)
    start = _nothing(c, columns, document, 0)
    dx, far, near_keys = scan(earlier_keys, start, (tiles, g))[1]
    end = _nothing(c, columns, document, -1)
    far_keys = scan(later_queries, end, (tiles, far), reverse=True)[1]
    keys = join(near_keys + far_keys, y.shape[1])
    dy, dlog_w, dv = keys[:width], keys[width], keys[width + 1 :]
    return join(dx, x.shape[1]), dy, dlog_w, dv


def _attend_backward(block, degree, kept, gout):
    dx, dy, dlog_w, dv = backward(block, degree, kept, gout)
    return dx, dy, jnp.zeros_like(dlog_w), dv, None


attend.defvjp(forward, _attend_backward)


def head(
    degree: int,
    block: int,
    tokens: Tokens,
    q: Float[Array, "n d"],
    k: Float[Array, "t d"],
    v: Float[Array, "t dv"],
) -> Float[Array, "n dv"]:
    """Outputs of one key head, `block` tokens to a block, by Taylor's polynomial."""
    # Features lie tokens last, models tokens first.
    exists = tokens.key.astype(q.dtype)
    out: Any = attend(block, degree, q.T, k.T, exists, v.T, tokens.query_document)
    return out.T
