"""Moments over keys of the certificate's columns, and from them bounds for every query (see
certificate.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.linalg import dot, down
from lora_limits.polynomial import evaluation, monomials, series


def even_order(degree: int) -> int:
    """t, the largest even number <= degree: the power of the score whose moments the certificate
    reads exactly.
    """
    return degree - degree % 2


def whole(degree: int) -> bool:
    """Whether s^t is of the top degree, t = g >= 2, and its moments come with those of the gradient
    itself.
    """
    return degree >= 2 and degree % 2 == 0


class KeyMoments(NamedTuple):
    """Sums over keys, all of non-negative columns z (C of them): what `rows` needs to bound any
    query.
    """

    low: jax.Array  # (features of degree <= max(g - 1, 0), C): sum_j w phi(y) z
    top: jax.Array  # (features of degree t, C): sum_j w |y|^{g-t} phi(y) z
    radial: jax.Array  # (g + 1, C): sum_j w |y|^m z
    second: jax.Array  # (d, d): sum_j w y y^T
    reach: jax.Array  # () max_j |y_j|
    box: jax.Array  # (d,) max_j |y_j| by coordinate


class Setup(NamedTuple):
    """What the row bounds need to know about P. h, h_prime: envelopes of exp - P and exp - P'
    (None: Taylor).
    """

    c: jax.Array
    h: tuple[jax.Array, jax.Array] | None
    h_prime: tuple[jax.Array, jax.Array] | None
    gamma: float
    jensen: bool


def powers(norm: jax.Array, degree: int) -> jax.Array:
    """|y|^0 .. |y|^degree: (1, n) -> (degree + 1, n)."""
    out = [jnp.ones_like(norm)]
    for _ in range(degree):
        out.append(out[-1] * norm)
    return jnp.concatenate(out)


def row_range(x: jax.Array, reach: jax.Array, box: jax.Array) -> jax.Array:
    """R_i >= max_j |s_ij|, the smaller of the Euclidean and the box bound. x: (d, n) -> (1, n)."""
    return jnp.minimum(jnp.sqrt(down(x**2)) * reach, dot(box[None], jnp.abs(x)))


def polynomials(setup: Setup, moments: KeyMoments, width: int) -> evaluation.Lift:
    """What `rows` wants evaluated: sum_j w z P'(s) for every column z, and sum_j w z |y|^{g-t} s^t.

    Where t is the top degree the two are the lower and the top part of the same C polynomials; else
    they are 2 C.
    """
    degree = setup.c.shape[0] - 1
    dtype = setup.c.dtype
    t = even_order(degree)
    below = monomials.count(width, max(degree - 1, 0))
    order, multinomial = monomials.tables(width, degree)
    prime = (series.derivative(setup.c) if degree else jnp.zeros_like(setup.c))[
        order[:below].astype(int)
    ]
    low = moments.low * (prime * jnp.asarray(multinomial[:below], dtype))[:, None]
    top = moments.top * jnp.asarray(
        multinomial[monomials.count(width, t - 1) : monomials.count(width, t), None], dtype
    )
    if whole(degree):
        return evaluation.make(jnp.concatenate([low, top]), 0, width, degree)
    padding = jnp.zeros((below - top.shape[0], top.shape[1]), dtype)
    return evaluation.Lift(jnp.concatenate([low, jnp.concatenate([padding, top])], 1).T, None, None)


class Rows(NamedTuple):
    """Bounds for n queries. Those up to `centre` are (C, n), roots as Cauchy-Schwarz wants them;
    the others (1, n).
    """

    eta: jax.Array  # eta[z] >= sum_j |eps_j| z_j
    eta_prime: jax.Array
    mean: jax.Array  # >= E_f[z]
    size: jax.Array  # sums of absolute values over D: what rounding is proportional to
    tilt: jax.Array  # >= |m(x)|, x one of the columns of which z is the square, if it is centred
    centre: jax.Array  # >= |E_f[x]|
    mass: jax.Array  # eta[1] itself
    certain: (
        jax.Array
    )  # lower bound of D_i over the sum of the weights: P certified positive where > 0
    slack: jax.Array  # b >= 1 / (1 + a_i)


def _radial_sums(setup: Setup, radial: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Coefficients in powers of |x|: the absolute sums behind P and P', behind P' alone; and the
    last moment.
    """
    c = jnp.abs(setup.c)[:, None] * radial
    n = np.arange(1, radial.shape[0], dtype=radial.dtype)[:, None]
    prime = jnp.concatenate(
        [jnp.abs(setup.c)[1:, None] * n * radial[:-1], jnp.zeros_like(radial[:1])]
    )
    size = c if setup.h is None else c + prime  # Taylor's P' is a part of P
    return size, prime, radial[-1:]


def rows(
    setup: Setup, moments: KeyMoments, x: jax.Array, values: evaluation.Values, d_sum, d_score
) -> Rows:
    """Row bounds of a block of queries.

    x: (d, n); values: of `polynomials` at x; d_sum (1, n): the computed D_i; d_score (1, n):
    rounding of the scores, which acts as one more error of exp, |e^{s + ds} - e^s| <= 2 ds e^s
    (`add_queries` counts it as rounding).
    """
    degree = setup.c.shape[0] - 1
    gamma = setup.gamma
    count = moments.radial.shape[1]
    prime = values.low[:count]
    nu = values.top if whole(degree) else values.low[count:]
    norm = jnp.sqrt(down(x**2))
    reach = row_range(x, moments.reach, moments.box) * (1 + 8 * jnp.finfo(x.dtype).eps) + d_score
    phi = series.remainder_factor(degree + 1, reach)
    norm, reach, phi, score_size = settle(
        norm, reach, phi, _score_size(setup, moments, x, norm, reach, d_score)
    )
    size, prime_size, last = _radial_sums(setup, moments.radial)
    p = powers(norm, degree)
    absolute = dot(jnp.concatenate([size, gamma * prime_size], 1).T, p)
    size = absolute[:count]
    prime = prime + absolute[count:]
    # |s|^g <= s^t (|x||y|)^{g-t}: upper bounds, rounding included, of sum_j w z |s|^g
    nu = nu * p[degree - even_order(degree)][None] + gamma * last.T * p[-1:]
    low = d_sum - gamma * size[:1]
    safe = jnp.where(low > 0, low, 1)
    flat = moments.radial[0][:, None]
    if setup.h is None or setup.h_prime is None:
        h = (0.0, phi)
        h_prime = (0.0, 1 / math.factorial(degree) + reach * phi)
    else:
        h = setup.h
        h_prime = setup.h_prime
    mass = (h[0] * flat[:1] + h[1] * reach * nu[:1]) / safe
    total = moments.radial[0, 0]
    floor = safe * (1 - mass)  # Z_i = D_i (1 + a_i)
    if setup.jensen:
        floor = jnp.maximum(
            floor, total * jnp.exp(-4 * gamma * (1 + norm * moments.reach) - d_score)
        )
    known = (low > 0) & (floor > 0)
    unknown = jnp.where(known, 0, jnp.inf).astype(x.dtype)
    inverse = 1 / safe
    floor = 1 / jnp.where(known, floor, 1) + unknown
    h_top = jnp.broadcast_to(h_prime[1], reach.shape)
    mass, inverse, floor, h_reach, h_top = settle(mass, inverse, floor, h[1] * reach, h_top)
    slack = (d_sum + gamma * size[:1]) * floor
    eta = h[0] * flat + h_reach * nu
    eta_prime = h_prime[0] * flat + h_top * nu
    # exp <= P' + |exp - P'|; rounding may leave it below 0 where it is nothing
    mean = jnp.maximum(prime + eta_prime, 0) * floor
    eta, eta_prime, mean, size = (
        jnp.sqrt(v) for v in (eta * inverse, eta_prime * inverse, mean, size * inverse)
    )
    tilt = (score_size * inverse) * jnp.sqrt(flat) + eta[:1] * eta
    # keys that were not centred have a mean that `tilt` does not know of
    centre = (
        jnp.minimum(mean, tilt + slack * (eta[:1] * eta + mass * tilt)) if setup.jensen else mean
    )
    return Rows(eta, eta_prime, mean, size, tilt, centre, mass, low / total, slack)


def settle(*rows: jax.Array) -> tuple[jax.Array, ...]:
    """The same rows, (1, n) each, computed once: by a product, which XLA does not fuse.

    Left to itself its CPU compiler repeats the long chains behind them in every consumer, once for
    each column. An infinite entry turns the others of its token into NaN, which the sums take as
    not certified.
    """
    stack = dot(jnp.eye(len(rows), dtype=rows[0].dtype), jnp.concatenate(rows))
    return tuple(stack[i : i + 1] for i in range(len(rows)))


def _score_size(setup: Setup, moments: KeyMoments, x: jax.Array, norm, reach, d_score) -> jax.Array:
    """(1, n), >= sqrt(sum_j w (e^s - 1)^2) by |e^s - 1| <= |s| (e^R - 1) / R: columns are centred,
    and feel no more.
    """
    square = down(x * dot(moments.second, x))
    square = jnp.maximum(square, 0) + setup.gamma * jnp.trace(moments.second) * norm**2
    root = jnp.sqrt(moments.radial[0, 0])
    r = jnp.maximum(reach, jnp.finfo(x.dtype).eps)
    return (jnp.sqrt(square) + d_score * root) * jnp.expm1(r) / r + setup.gamma * root
