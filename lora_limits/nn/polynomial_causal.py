"""Causal attention in linear time: a query's own block exactly, the blocks before by k features.

One key head: x (d, T G) queries, those of one token side by side, y (d, T) keys, w (T,) 1 where a
key exists and 0 where not, v (d_value, T); psi, C, phi and P (Taylor) as in gradients/sweeps.py.
For a query i of block b:

    [D_i, D_i out_i] = psi(x_i) C M_{<b} + sum_{j <= i in b} w_j exp(x_i . y_j) [1, v_j],
    M_{<b} = sum_{j in blocks before b} w_j phi(y_j) [1, v_j]

Backward, with g_i = [-<gout_i, out_i>, gout_i] / D_i, M_{<b} is built again, in order, for dx; and
then from the last block to the first T_{>b} = sum_{i in blocks after b} psi(x_i) g_i, for dy and
dv. What is kept for the way back is the inputs, D and the output. Nothing is centred or fitted:
centres would be made of tokens yet to come.

Documents are runs of tokens. One that a block shares with the block before is the last there and
the first here, so that M need only hold the keys of one: it starts anew where a document does.

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
from lora_limits.linalg import dot
from lora_limits.nn.features import (
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
from lora_limits.nn.visibility import Pattern, Tokens
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


def _diagonal(tile: _Tile) -> tuple[Float[Array, "gn n"], Float[Array, "1 gn"]]:
    """(exp(x_i . y_j - m_i) w_j for j <= i, else 0; exp(-m_i)), m_i >= 0 the largest exponent."""
    x, y = tile.x, tile.y
    group = x.shape[1] // y.shape[1]
    token = np.arange(x.shape[1]) // group
    not_later = token[:, None] >= np.arange(y.shape[1])[None]
    allowed = jnp.asarray(not_later) & (tile.w > 0)
    of_queries = tile.of_queries
    if of_queries is not None:
        allowed = allowed & (tile.document == of_queries.T)
    s = dot(x.T, y)
    top = jnp.max(s, axis=1, keepdims=True, where=allowed, initial=0.0)
    # Later tokens are masked before exp too, so that none of them can overflow.
    exponents = jnp.where(allowed, s - top, 0)
    return jnp.where(allowed, jnp.exp(exponents), 0), jnp.exp(-top).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    block: int,
    degree: int,
    axis: Axis,
    x: Float[Array, "d gt"],
    y: Float[Array, "d t"],
    w: Float[Array, " t"],
    v: Float[Array, "dv t"],
    document: Int[Array, " t"] | None,
) -> Float[Array, "dv gt"]:
    """Outputs of the queries x, `block` tokens to a block. document: runs, numbered upwards; None
    where tokens are split over devices.

    O(T G (k (1 + d_value) + block (d + d_value))) time, O(k (1 + d_value) + G block (k + block))
    memory besides inputs and outputs. NaN where the normaliser is not positive. The derivative in w
    is taken to be 0.
    """
    return _forward(block, degree, axis, x, y, w, v, document)[0]


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


def _keys_before(degree: int, axis: Axis, start: _Sum, tiles: _Tile) -> _Sum:
    """M of the tokens before this device's first."""
    if axis is None:
        return start

    def add(before, tile):
        return _add_keys(before, tile, degree), None

    own = scan(add, start, tiles)[0].total
    return _Sum(collectives.before(own, axis), None)


def _queries_after(degree: int, axis: Axis, end: _Sum, tiles: _Tile, far: jax.Array) -> _Sum:
    """T of the tokens behind this device's last."""
    if axis is None:
        return end

    def add(total, this):
        x, far = this
        return total + monomials.products(monomials.by_degree(x, degree), far), None

    own = scan(add, end.total, (tiles.x, far))[0]
    return _Sum(collectives.after(own, axis), None)


def _forward(block, degree, axis, x, y, w, v, document):
    width = y.shape[0]
    columns = 1 + v.shape[0]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)

    def visit(before, tile):
        near, shrink = _diagonal(tile)
        # Both parts of u are scaled by exp(-m_i), which cancels in the output.
        shrink = _of(tile.of_queries, before.document, shrink)
        far = evaluate(c * before.total, monomials.by_degree(tile.x, degree)) * shrink
        u = far + dot(tile.one_v, near.T)
        return _add_keys(before, tile, degree), jnp.concatenate([u[:1], normalised(u)])

    tiles = _tiles(block, x, y, w, v, document)
    start = _keys_before(degree, axis, _nothing(c, columns, document, 0), tiles)
    both = join(scan(visit, start, tiles)[1], x.shape[1])
    normaliser, out = both[0], both[1:]
    return out, (x, y, w, v, document, start, normaliser, out)


def _backward(block, degree, axis, kept, gout):
    x, y, w, v, document, start, normaliser, out = kept
    x, out, normaliser = asked_for(gout, x, out, normaliser)
    width = y.shape[0]
    columns = 1 + v.shape[0]
    group = x.shape[1] // y.shape[1]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)
    tiles = _tiles(block, x, y, w, v, document)

    def earlier_keys(before, this):
        tile, g = this
        near, shrink = _diagonal(tile)
        # D was kept scaled by exp(-m_i), so g is right for the diagonal and too large beyond it.
        far = g * _of(tile.of_queries, before.document, shrink)
        p = near * dot(g.T, tile.one_v)
        lifted = evaluation.make(c * before.total, columns, width, degree)
        parts = monomials.by_degree(tile.x, lower(degree) - 1)
        dx = slopes(lifted, tile.x, parts, far)[1] + dot(tile.y, p.T)
        near_keys = jnp.concatenate([dot(tile.x, p), dot(g[1:], near)])
        return _add_keys(before, tile, degree), (dx, far, near_keys)

    def later_queries(after, this):
        tile, far = this
        back = evaluation.make(c * after.total, columns, width, degree)
        w = _of(tile.document, after.document, tile.w)
        parts = monomials.by_degree(tile.y, lower(degree) - 1)
        u, dy = slopes(back, tile.y, parts, tile.one_v * w)
        more = monomials.products(monomials.by_degree(tile.x, degree), far)
        # Of the queries here, those of the first document alone see keys of earlier blocks.
        return after.plus(more, tile.end(0)), jnp.concatenate([dy, u[1:] * w])

    g = split(cotangent(gout, out, normaliser), tiles.y.shape[2] * group)
    dx, far, near_keys = scan(earlier_keys, start, (tiles, g))[1]
    end = _queries_after(degree, axis, _nothing(c, columns, document, -1), tiles, far)
    far_keys = scan(later_queries, end, (tiles, far), reverse=True)[1]
    keys = join(near_keys + far_keys, y.shape[1])
    dy, dv = keys[:width], keys[width:]
    return join(dx, x.shape[1]), dy, jnp.zeros_like(w), dv, None


attend.defvjp(_forward, _backward)


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
    given = q.T, k.T, exists, v.T, tokens.query_document
    out: Any = attend(block, degree, pattern.axis, *given)
    return out.T
