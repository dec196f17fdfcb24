"""Attention in which every query sees every key, and its derivative, through k features.

One key head: x (d, n) queries, y (d, S) keys, w (S,) weights, v (d_value, S); psi, C, phi and P as
in gradients/sweeps.py.

    forward     M = sum_j w_j phi(y_j) [1, v_j]
                [D_i, D_i out_i] = psi(x_i) C M
    backward    g_i = [-<gout_i, out_i>, gout_i] / D_i
                dx_i = grad_x (psi(x_i) C M g_i),   T = sum_i psi(x_i) g_i
                u_j = phi(y_j) C T
                dy_j = w_j grad_y (u_j . [1, v_j]),   dw_j = u_j . [1, v_j],   dv_j = w_j u_j[1:]

Two sweeps each way over blocks of tokens. What is kept for the way back is the inputs, M, D and the
output.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.sampling import sample_rows
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    block: int, c: jax.Array, x: jax.Array, y: jax.Array, w: jax.Array, v: jax.Array
) -> jax.Array:
    """Outputs (d_value, n) of queries x (d, n) with P given by its coefficients c (degree + 1,).

    O((n + S) k (1 + d_value)) time, O(k (1 + d_value) + block k) memory besides inputs and outputs.
    NaN where the normaliser is not positive. The derivative in c is taken to be 0.
    """
    return _forward(block, c, x, y, w, v)[0]


def _forward(block, c, x, y, w, v):
    degree = c.shape[0] - 1
    width = y.shape[0]

    def keys(m, tile):
        y, z = tile
        return m + monomials.products(monomials.by_degree(y, degree), z), None

    def queries(x):
        u = evaluate(m, monomials.by_degree(x, degree))
        return jnp.concatenate([u[:1], normalised(u)])

    z = with_ones(v) * w[None]
    start = jnp.zeros((monomials.count(width, degree), z.shape[0]), x.dtype)
    by_key = min(block, y.shape[1])
    by_query = min(block, x.shape[1])
    m = jax.lax.scan(keys, start, (split(y, by_key), split(z, by_key)))[0] * monomials.coefficients(
        c, width
    )
    both = join(jax.lax.map(queries, split(x, by_query)), x.shape[1])
    return both[1:], (c, x, y, w, v, m, both[0], both[1:])


def _backward(block, saved, gout):
    c, x, y, w, v, m, normaliser, out = saved
    degree = c.shape[0] - 1
    width = y.shape[0]
    lifted = evaluation.make(m, m.shape[1], width, degree)

    def queries(total, tile):
        x, g = tile
        parts = monomials.by_degree(x, degree)
        dx = slopes(lifted, x, parts[: lower(degree)], g)[1]
        return total + monomials.products(parts, g), dx

    def keys(tile):
        y, one_v, w = tile
        u, dy = slopes(back, y, monomials.by_degree(y, lower(degree) - 1), one_v * w)
        return jnp.concatenate([dy, (u * one_v).sum(0, keepdims=True), u[1:] * w])

    by_key = min(block, y.shape[1])
    by_query = min(block, x.shape[1])
    g = cotangent(gout, out, normaliser)
    total, dx = jax.lax.scan(queries, jnp.zeros_like(m), (split(x, by_query), split(g, by_query)))
    back = evaluation.make(total * monomials.coefficients(c, width), m.shape[1], width, degree)
    tiles = (split(y, by_key), split(with_ones(v), by_key), split(w[None], by_key))
    grads = join(jax.lax.map(keys, tiles), y.shape[1])
    return jnp.zeros_like(c), join(dx, x.shape[1]), grads[:width], grads[width], grads[width + 1 :]


attend.defvjp(_forward, _backward)


def coefficients(method, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """Coefficients of P on the range of the scores, |s| <= max |x_i| max |y_j|: (degree + 1,)."""
    if method.series == "taylor":
        return series.taylor(method.degree, x.dtype)
    longest_key = jnp.where(w > 0, (y**2).sum(0), 0).max()
    longest = jnp.sqrt((x**2).sum(0).max() * longest_key)
    radius = jnp.maximum(longest * (1 + 64 * float(jnp.finfo(x.dtype).eps)), 0.05)
    scores = jnp.clip(dot(sample_rows(x.T, 64), sample_rows(y.T).T), -radius, radius)
    weights = jnp.broadcast_to(sample_rows(w[:, None]).T, scores.shape)
    weights = weights + float(jnp.finfo(x.dtype).tiny)
    sample = (scores.reshape(-1), weights.reshape(-1))
    return series.coefficients(method.series, method.degree, radius, sample)


def head(
    method, block: int, q: jax.Array, k: jax.Array, v: jax.Array, exists: jax.Array
) -> jax.Array:
    """Outputs of one key head: (n, d), (S, d), (S, d_value), (S,) booleans -> (n, d_value).

    Its centres and its series are constants to the derivative.
    """
    hold = jax.lax.stop_gradient
    frame = frames.of_rows(hold(q), hold(k), hold(v), exists, method.centred)
    k = k - frame.mu[None]
    x = dot(frame.to_x, (q - frame.nu[None]).T)
    y = dot(frame.to_y, k.T)
    w = frame.weights(k, exists)
    c = coefficients(method, hold(x), hold(y), hold(w))
    out: Any = attend(block, c, x, y, w, (v - frame.v_mean[None]).T)
    return out.T + frame.v_mean[None]
