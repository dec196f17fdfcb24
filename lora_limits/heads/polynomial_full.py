"""Attention in which every query sees every key, and its derivative, through k features.

One key head: x (d, n) queries, y (d, S) keys, w (S,) weights, v (d_value, S); psi, C, phi and P as
in gradients/sweeps.py.

    forward     M = sum_j w_j phi(y_j) [1, v_j]
                [D_i, D_i out_i] = psi(x_i) C M
    backward    g_i = [-<gout_i, out_i>, gout_i] / D_i
                dx_i = grad_x (psi(x_i) C M g_i),   T = sum_i psi(x_i) g_i
                u_j = phi(y_j) C T
                dy_j = w_j grad_y (u_j . [1, v_j]),   dw_j = u_j . [1, v_j],   dv_j = w_j u_j[1:]

Two sweeps each way over blocks of tokens. What is kept for the way back is the inputs, C M, D and
the output. Where tokens are split over devices (`axis`), M and T are summed over them once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates import collectives
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.sampling import own, sample_rows
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
from lora_limits.linalg import dot
from lora_limits.polynomial import evaluation, monomials, series

QUERIES = 64  # sampled, for the scores that a series is fitted to
LEAST_RADIUS = 0.05  # below it a series for exp is not worth fitting


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    block: int,
    axis: Axis,
    c: Float[Array, " g_and_1"],
    x: Float[Array, "d n"],
    y: Float[Array, "d s"],
    w: Float[Array, " s"],
    v: Float[Array, "dv s"],
) -> Float[Array, "dv n"]:
    """Outputs of the queries x, with P given by its coefficients c.

    O((n + S) k (1 + d_value)) time, O(k (1 + d_value) + block k) memory besides inputs and outputs.
    NaN where the normaliser is not positive. The derivative in c is taken to be 0.
    """
    return forward(block, axis, c, x, y, w, v)[0]


def forward(block, axis, c, x, y, w, v):
    """(outputs, what `backward` keeps, whose last two are the normalisers D and the outputs)."""
    m = _moments(block, axis, c, y, with_ones(v) * w[None])

    def queries(x):
        # [D, D out], then [D, out]
        u = evaluate(m, monomials.by_degree(x, c.shape[0] - 1))
        return jnp.concatenate([u[:1], normalised(u)])

    by_query = min(block, x.shape[1])
    both = join(jax.lax.map(queries, split(x, by_query)), x.shape[1])
    normaliser, out = both[0], both[1:]
    return out, (c, x, y, w, v, m, normaliser, out)


def _moments(block: int, axis: Axis, c, y, z: Float[Array, "c s"]) -> Float[Array, "k c"]:
    """C M, of columns z that have the weights in them."""
    degree = c.shape[0] - 1

    def add_keys(m, tile):
        y, z = tile
        return m + monomials.products(monomials.by_degree(y, degree), z), None

    start = jnp.zeros((monomials.count(y.shape[0], degree), z.shape[0]), y.dtype)
    by_key = min(block, y.shape[1])
    tiles = (split(y, by_key), split(z, by_key))
    m = collectives.total(scan(add_keys, start, tiles)[0], axis)
    return m * monomials.coefficients(c, y.shape[0])


def sums(
    block: int,
    c: Float[Array, " g_and_1"],
    x: Float[Array, "d n"],
    y: Float[Array, "d s"],
    w: Float[Array, " s"],
    z: Float[Array, "c s"],
) -> Float[Array, "c n"]:
    """sum_j w_j P(s_ij) z_j over all keys, P by its coefficients c. O((n + S) k c) time."""
    m = _moments(block, None, c, y, z * w[None])

    def queries(x):
        return evaluate(m, monomials.by_degree(x, c.shape[0] - 1))

    return join(jax.lax.map(queries, split(x, min(block, x.shape[1]))), x.shape[1])


def backward(block, axis, kept, gout):
    """(0, dx, dy, dw, dv) from the cotangent of the outputs."""
    c, x, y, w, v, m, normaliser, out = kept
    degree = c.shape[0] - 1
    width = y.shape[0]
    columns = m.shape[1]
    x, out, normaliser = asked_for(gout, x, out, normaliser)
    lifted = evaluation.make(m, columns, width, degree)

    def queries(total, tile):
        x, g = tile
        parts = monomials.by_degree(x, degree)
        dx = slopes(lifted, x, parts[: lower(degree)], g)[1]
        return total + monomials.products(parts, g), dx

    def keys(tile):
        y, one_v, w = tile
        parts = monomials.by_degree(y, lower(degree) - 1)
        u, dy = slopes(back, y, parts, one_v * w)
        dw = (u * one_v).sum(0, keepdims=True)
        dv = u[1:] * w
        return jnp.concatenate([dy, dw, dv])

    # dx, and T on the way
    by_query = min(block, x.shape[1])
    g = cotangent(gout, out, normaliser)
    tiles = (split(x, by_query), split(g, by_query))
    total, dx = scan(queries, jnp.zeros_like(m), tiles)
    total = collectives.total(total, axis)
    # dy, dw and dv, from C T
    back = evaluation.make(total * monomials.coefficients(c, width), columns, width, degree)
    by_key = min(block, y.shape[1])
    tiles = (split(y, by_key), split(with_ones(v), by_key), split(w[None], by_key))
    grads = join(jax.lax.map(keys, tiles), y.shape[1])
    dy, dw, dv = grads[:width], grads[width], grads[width + 1 :]
    return jnp.zeros_like(c), join(dx, x.shape[1]), dy, dw, dv


attend.defvjp(forward, backward)


def coefficients(
    method: Any,  # a Polynomial
    x: Float[Array, "d n"],
    y: Float[Array, "d s"],
    asked: Bool[Array, " n"],
    w: Float[Array, " s"],
    axis: Axis = None,
) -> Float[Array, " g_and_1"]:
    """Coefficients of P on the range of the scores, |s| <= max |x_i| max |y_j|.

    Of the queries that `asked` says there are, and the keys that have a weight, on all devices.
    """
    if method.series == "taylor":
        return series.taylor(method.degree, x.dtype)
    # Padding must not stretch the range.
    longest_query = jnp.where(asked, (x**2).sum(0), 0).max()
    longest_key = jnp.where(w > 0, (y**2).sum(0), 0).max()
    longest_query, longest_key = collectives.largest((longest_query, longest_key), axis)
    longest = jnp.sqrt(longest_query * longest_key)
    # Rounding must not put a score outside of the range.
    rounding = 64 * float(jnp.finfo(x.dtype).eps)
    radius = jnp.maximum(longest * (1 + rounding), LEAST_RADIUS)

    queries = jnp.concatenate([x.T, asked.astype(x.dtype)[:, None]], 1)
    keys = jnp.concatenate([y.T, w[:, None]], 1)
    queries = own(sample_rows(queries, QUERIES, axis), queries.shape[0], axis)
    keys = own(sample_rows(keys, axis=axis), keys.shape[0], axis)
    queries, keys = collectives.total((queries, keys), axis)
    scores = jnp.clip(dot(queries[:, :-1], keys[:, :-1].T), -radius, radius)
    weights = queries[:, -1:] * keys[:, -1:].T
    # Weights that are all 0 would be divided by their sum.
    weights = weights + float(jnp.finfo(x.dtype).tiny)
    sample = (scores.reshape(-1), weights.reshape(-1))
    return series.coefficients(method.series, method.degree, radius, sample)


def head(
    method: Any,  # a Polynomial
    block: int,
    pattern: Pattern,
    tokens: Tokens,
    q: Float[Array, "n d"],
    k: Float[Array, "s d"],
    v: Float[Array, "s dv"],
) -> Float[Array, "n dv"]:
    """Outputs of one key head. Its centres and its series are constants to the derivative."""
    hold = jax.lax.stop_gradient
    asked = jnp.repeat(tokens.query, pattern.group)
    frame = frames.of_rows(
        hold(q), hold(k), hold(v), asked, tokens.key, method.centred, pattern.axis
    )
    k = k - frame.mu[None]
    x = dot(frame.to_x, (q - frame.nu[None]).T)
    y = dot(frame.to_y, k.T)
    w = frame.weights(k, tokens.key)
    c = coefficients(method, hold(x), hold(y), asked, hold(w), pattern.axis)
    # Rows of f~ sum to 1: the mean of the values passes unchanged, and errors scale with the rest.
    out: Any = attend(block, pattern.axis, c, x, y, w, (v - frame.v_mean[None]).T)
    return out.T + frame.v_mean[None]
