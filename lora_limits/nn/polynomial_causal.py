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
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_limits.linalg import dot
from lora_limits.nn.features import (
    cotangent,
    evaluate,
    join,
    lower,
    normalised,
    slopes,
    split,
    with_ones,
)
from lora_limits.polynomial import evaluation, monomials, series


def _diagonal(
    x: Float[Array, "d gn"], y: Float[Array, "d n"], w: Float[Array, "1 n"]
) -> tuple[Float[Array, "gn n"], Float[Array, "1 gn"]]:
    """(exp(x_i . y_j - m_i) w_j for j <= i, else 0; exp(-m_i)), m_i >= 0 the largest exponent."""
    group = x.shape[1] // y.shape[1]
    token = np.arange(x.shape[1]) // group
    not_later = token[:, None] >= np.arange(y.shape[1])[None]
    allowed = jnp.asarray(not_later) & (w > 0)
    s = dot(x.T, y)
    top = jnp.max(s, axis=1, keepdims=True, where=allowed, initial=0.0)
    # Later tokens are masked before exp too, so that none of them can overflow.
    exponents = jnp.where(allowed, s - top, 0)
    return jnp.where(allowed, jnp.exp(exponents), 0), jnp.exp(-top).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    block: int,
    degree: int,
    x: Float[Array, "d gt"],
    y: Float[Array, "d t"],
    w: Float[Array, " t"],
    v: Float[Array, "dv t"],
) -> Float[Array, "dv gt"]:
    """Outputs of the queries x, `block` tokens to a block.

    O(T G (k (1 + d_value) + block (d + d_value))) time, O(k (1 + d_value) + G block (k + block))
    memory besides inputs and outputs. NaN where the normaliser is not positive. The derivative in w
    is taken to be 0.
    """
    return _forward(block, degree, x, y, w, v)[0]


def _tiles(block, x, y, w, v):
    """The blocks of (x, y, w, [1, v]), what both scans run over."""
    group = x.shape[1] // y.shape[1]
    size = min(block, y.shape[1])
    return split(x, size * group), split(y, size), split(w[None], size), split(with_ones(v), size)


def _forward(block, degree, x, y, w, v):
    width = y.shape[0]
    columns = 1 + v.shape[0]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)

    def visit(m, tile):
        x, y, w, one_v = tile
        near, shrink = _diagonal(x, y, w)
        # Both parts of u are scaled by exp(-m_i), which cancels in the output.
        before = evaluate(c * m, monomials.by_degree(x, degree)) * shrink
        u = before + dot(one_v, near.T)
        m = m + monomials.products(monomials.by_degree(y, degree), one_v * w)
        return m, jnp.concatenate([u[:1], normalised(u)])

    start = jnp.zeros((c.shape[0], columns), x.dtype)
    both = jax.lax.scan(visit, start, _tiles(block, x, y, w, v))[1]
    both = join(both, x.shape[1])
    normaliser, out = both[0], both[1:]
    return out, (x, y, w, v, normaliser, out)


def _backward(block, degree, kept, gout):
    x, y, w, v, normaliser, out = kept
    width = y.shape[0]
    columns = 1 + v.shape[0]
    group = x.shape[1] // y.shape[1]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)
    tiles = _tiles(block, x, y, w, v)
    start = jnp.zeros((c.shape[0], columns), x.dtype)

    def before(m, tile):
        (x, y, w, one_v), g = tile
        near, shrink = _diagonal(x, y, w)
        # D was kept scaled by exp(-m_i), so g is right for the diagonal and too large beyond it.
        far = g * shrink
        p = near * dot(g.T, one_v)
        lifted = evaluation.make(c * m, columns, width, degree)
        dx = slopes(lifted, x, monomials.by_degree(x, lower(degree) - 1), far)[1]
        dx = dx + dot(y, p.T)
        m = m + monomials.products(monomials.by_degree(y, degree), one_v * w)
        near_dy = dot(x, p)
        near_dv = dot(g[1:], near)
        return m, (dx, far, jnp.concatenate([near_dy, near_dv]))

    def after(total, tile):
        (x, y, w, one_v), far = tile
        back = evaluation.make(c * total, columns, width, degree)
        u, dy = slopes(back, y, monomials.by_degree(y, lower(degree) - 1), one_v * w)
        dv = u[1:] * w
        total = total + monomials.products(monomials.by_degree(x, degree), far)
        return total, jnp.concatenate([dy, dv])

    queries_a_block = tiles[1].shape[2] * group
    g = split(cotangent(gout, out, normaliser), queries_a_block)
    dx, far, near_keys = jax.lax.scan(before, start, (tiles, g))[1]
    far_keys = jax.lax.scan(after, start, (tiles, far), reverse=True)[1]
    keys = join(near_keys + far_keys, y.shape[1])
    dy, dv = keys[:width], keys[width:]
    return join(dx, x.shape[1]), dy, jnp.zeros_like(w), dv


attend.defvjp(_forward, _backward)
