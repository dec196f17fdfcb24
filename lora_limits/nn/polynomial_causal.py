"""Causal attention in linear time: a query's own block exactly, the blocks before by k features.

One key head: x (d, T G) queries, those of one token side by side, y (d, T) keys, w (T,) 1 where a
key exists and 0 where not, v (d_value, T); psi, C, phi and P (Taylor) as in gradients/sweeps.py. For a query
i of block b:

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


def _diagonal(x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(exp(x_i . y_j - m_i) w_j for j <= i else 0, (G n, n); exp(-m_i), (1, G n)).

    m_i >= 0 is the largest exponent.
    """
    token = np.arange(x.shape[1]) // (x.shape[1] // y.shape[1])
    allowed = jnp.asarray(token[:, None] >= np.arange(y.shape[1])[None]) & (w > 0)
    s = dot(x.T, y)
    top = jnp.max(s, axis=1, keepdims=True, where=allowed, initial=0.0)
    return jnp.where(allowed, jnp.exp(jnp.where(allowed, s - top, 0)), 0), jnp.exp(-top).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    block: int, degree: int, x: jax.Array, y: jax.Array, w: jax.Array, v: jax.Array
) -> jax.Array:
    """Outputs (d_value, T G), blocks of `block` tokens. NaN where the normaliser is not positive.

    O(T G (k (1 + d_value) + block (d + d_value))) time, O(k (1 + d_value) + G block (k + block))
    memory besides inputs and outputs. The derivative in w is taken to be 0.
    """
    return _forward(block, degree, x, y, w, v)[0]


def _tiles(block: int, x: jax.Array, y: jax.Array, w: jax.Array, v: jax.Array):
    """The inputs in blocks, and the diagonal of C."""
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
        u = evaluate(c * m, monomials.by_degree(x, degree)) * shrink + dot(one_v, near.T)
        m = m + monomials.products(monomials.by_degree(y, degree), one_v * w)
        return m, jnp.concatenate([u[:1], normalised(u)])

    start = jnp.zeros((c.shape[0], columns), x.dtype)
    both = join(jax.lax.scan(visit, start, _tiles(block, x, y, w, v))[1], x.shape[1])
    return both[1:], (x, y, w, v, both[0], both[1:])


def _backward(block, degree, saved, gout):
    x, y, w, v, normaliser, out = saved
    width = y.shape[0]
    columns = 1 + v.shape[0]
    group = x.shape[1] // y.shape[1]
    c = monomials.coefficients(series.taylor(degree, x.dtype), width)
    tiles = _tiles(block, x, y, w, v)
    start = jnp.zeros((c.shape[0], columns), x.dtype)

    def before(m, tile):
        (x, y, w, one_v), g = tile
        near, shrink = _diagonal(x, y, w)
        far = g * shrink
        p = near * dot(g.T, one_v)
        lifted = evaluation.make(c * m, columns, width, degree)
        dx = slopes(lifted, x, monomials.by_degree(x, lower(degree) - 1), far)[1] + dot(y, p.T)
        m = m + monomials.products(monomials.by_degree(y, degree), one_v * w)
        return m, (dx, far, jnp.concatenate([dot(x, p), dot(g[1:], near)]))

    def after(total, tile):
        (x, y, w, one_v), far = tile
        back = evaluation.make(c * total, columns, width, degree)
        u, dy = slopes(back, y, monomials.by_degree(y, lower(degree) - 1), one_v * w)
        total = total + monomials.products(monomials.by_degree(x, degree), far)
        return total, jnp.concatenate([dy, u[1:] * w])

    g = split(cotangent(gout, out, normaliser), tiles[1].shape[2] * group)
    dx, far, near_keys = jax.lax.scan(before, start, (tiles, g))[1]
    far_keys = jax.lax.scan(after, start, (tiles, far), reverse=True)[1]
    keys = join(near_keys + far_keys, y.shape[1])
    return join(dx, x.shape[1]), keys[:width], jnp.zeros_like(w), keys[width:]


attend.defvjp(_forward, _backward)
