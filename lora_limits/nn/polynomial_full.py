"""Attention in which every query sees every key, and its derivative, through k features, block by
block.

One key head: x (d, n) queries, y (d, S) keys, w (S,) weights, v (d_value, S); psi, C, phi and P as
in moments.py.

    forward     M = sum_j w_j phi(y_j) [1, v_j]          [D_i, D_i out_i] = psi(x_i) C M
    backward    g_i = [-<gout_i, out_i>, gout_i] / D_i    dx_i = grad_x (psi(x_i) C M g_i)      T = sum_i psi(x_i) g_i
                u_j = phi(y_j) C T    dy_j = w_j grad_y (u_j . [1, v_j])    dw_j = u_j . [1, v_j]    dv_j = w_j u_j[1:]

Two sweeps each way over blocks of tokens. What is kept for the way back is the inputs, M, D and the
output.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.coordinates.frame import balance, sample_rows
from lora_limits.linalg import dot
from lora_limits.polynomial import evaluation, monomials
from lora_limits.polynomial import series as polynomial


class Frame(NamedTuple):
    """Coordinates in which scores are small (frame.py), constants to the derivative."""

    nu: jax.Array  # (d,) centre of the queries
    mu: jax.Array  # (d,) weighted centre of the keys
    v_mean: jax.Array  # (d_value,) weighted mean of the values
    shift: jax.Array  # () largest log-weight
    to_x: jax.Array  # (d, d)
    to_y: jax.Array  # (d, d)


def split(x: jax.Array, size: int) -> jax.Array:
    """(c, n) -> (blocks, c, size), zeros behind the last token."""
    blocks = -(-x.shape[1] // size)
    padded = jnp.pad(x, ((0, 0), (0, blocks * size - x.shape[1])))
    return padded.reshape(x.shape[0], blocks, size).transpose(1, 0, 2)


def join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `split`: (blocks, c, size) -> (c, length)."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)[:, :length]


def with_ones(v: jax.Array) -> jax.Array:
    """[1, v]: (d_value, n) -> (1 + d_value, n)."""
    return jnp.concatenate([jnp.ones_like(v[:1]), v])


def coefficients(c: jax.Array, width: int) -> jax.Array:
    """The diagonal of C: (k, 1)."""
    order, multinomial = monomials.tables(width, c.shape[0] - 1)
    return (c[order.astype(int)] * jnp.asarray(multinomial, c.dtype))[:, None]


def evaluate(m: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Polynomials with coefficients m (k, c) where the features are `parts`: (c, n)."""
    top = parts[-1].shape[0]
    out = dot(m[-top:].T, parts[-1])
    return out if len(parts) == 1 else out + dot(m[:-top].T, jnp.concatenate(parts[:-1]))


def normalised(u: jax.Array) -> jax.Array:
    """u[1:] / u[0], NaN where the normaliser u[0] is not positive."""
    good = u[:1] > 0
    return jnp.where(good, u[1:] / jnp.where(good, u[:1], 1), jnp.nan)


def cotangent(gout: jax.Array, out: jax.Array, normaliser: jax.Array) -> jax.Array:
    """g (1 + d_value, n). A token that is not asked for gives 0; one that is, and has no
    normaliser, gives NaN.
    """
    good = normaliser[None] > 0
    gout = jnp.where(good | (gout == 0), gout, jnp.nan)
    rho = (gout * jnp.where(good, out, 0)).sum(0, keepdims=True)
    return jnp.concatenate([-rho, gout]) / jnp.where(good, normaliser[None], 1)


def slopes(
    lifted: evaluation.Lift, x: jax.Array, parts: list[jax.Array], z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(u (c, n), sum_c z_c grad u_c (d, n)) at tokens x (d, n), `parts` their features of degrees
    below the top one.
    """
    values = evaluation.evaluate(lifted, x, parts)
    return values.low + values.top, evaluation.slope(lifted, values, x, parts, z)


def lower(degree: int) -> int:
    """How many degrees of features `slopes` wants."""
    return max(degree, 1)


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
    m = jax.lax.scan(keys, start, (split(y, by_key), split(z, by_key)))[0] * coefficients(c, width)
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
    back = evaluation.make(total * coefficients(c, width), m.shape[1], width, degree)
    tiles = (split(y, by_key), split(with_ones(v), by_key), split(w[None], by_key))
    grads = join(jax.lax.map(keys, tiles), y.shape[1])
    return jnp.zeros_like(c), join(dx, x.shape[1]), grads[:width], grads[width], grads[width + 1 :]


attend.defvjp(_forward, _backward)


def frame(q: jax.Array, k: jax.Array, v: jax.Array, exists: jax.Array, centred: bool) -> Frame:
    """The frame of queries (n, d), keys (S, d) and values (S, d_value), of which `exists` (S,)
    count.
    """
    nu = q.mean(0) if centred else jnp.zeros_like(q[0])
    log_w = dot(k, nu)
    shift = jnp.max(log_w, where=exists, initial=float(jnp.finfo(q.dtype).min))
    w = _weights(log_w - shift, exists)
    shares = w / jnp.maximum(w.sum(), 1)  # the largest weight is 1, unless there is no key
    mu = dot(shares, k) if centred else jnp.zeros_like(k[0])
    x = q - nu[None]
    y = k - mu[None]
    n, n_inverse = balance(dot(x.T, x), dot((y * w[:, None]).T, y))
    return Frame(nu, mu, dot(shares, v), shift, n_inverse, n)


def _weights(log_w: jax.Array, exists: jax.Array) -> jax.Array:
    return jnp.where(exists, jnp.exp(jnp.where(exists, log_w, 0)), 0)


def series(method, x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """Coefficients of P on the range of the scores, |s| <= max |x_i| max |y_j|: (degree + 1,)."""
    if method.series == "taylor":
        return polynomial.taylor(method.degree, x.dtype)
    longest = jnp.sqrt((x**2).sum(0).max() * jnp.where(w > 0, (y**2).sum(0), 0).max())
    radius = jnp.maximum(longest * (1 + 64 * float(jnp.finfo(x.dtype).eps)), 0.05)
    scores = jnp.clip(dot(sample_rows(x.T, 64), sample_rows(y.T).T), -radius, radius)
    weights = jnp.broadcast_to(sample_rows(w[:, None]).T, scores.shape) + float(
        jnp.finfo(x.dtype).tiny
    )
    return polynomial.coefficients(
        method.series, method.degree, radius, (scores.reshape(-1), weights.reshape(-1))
    )


def head(
    method, block: int, q: jax.Array, k: jax.Array, v: jax.Array, exists: jax.Array
) -> jax.Array:
    """Outputs (n, d_value) of one key head: queries (n, d), keys (S, d), values (S, d_value),
    exists (S,).
    """
    hold = jax.lax.stop_gradient
    f = frame(hold(q), hold(k), hold(v), exists, method.centred)
    x = dot(f.to_x, (q - f.nu[None]).T)
    y = dot(f.to_y, (k - f.mu[None]).T)
    w = _weights(dot(k, f.nu) - f.shift, exists)
    out: Any = attend(
        block, series(method, hold(x), hold(y), hold(w)), x, y, w, (v - f.v_mean[None]).T
    )
    return out.T + f.v_mean[None]
