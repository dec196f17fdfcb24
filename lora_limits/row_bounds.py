"""Moments over keys of the certificate's columns, and from them bounds for every query (see certificate.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits import monomials, polynomial
from lora_limits.problem import dot


def even_order(degree: int) -> int:
    """t, the largest even number <= degree: the power of the score whose moments the certificate reads exactly."""
    return degree - degree % 2


class KeyMoments(NamedTuple):
    """Sums over keys, all of non-negative columns z (C of them): what `rows` needs to bound any query."""

    low: jax.Array  # (features of degree <= t, C): sum_j w phi(y) z
    top: jax.Array  # (features of degree t, C): sum_j w |y|^{g-t} phi(y) z
    radial: jax.Array  # (g + 1, C): sum_j w |y|^m z
    reach: jax.Array  # () max_j |y_j|
    box: jax.Array  # (d,) max_j |y_j| by coordinate


def zero_moments(width: int, degree: int, count: int, dtype) -> KeyMoments:
    """The empty sums."""
    t = even_order(degree)
    low = monomials.count(width, t)
    top = low - (monomials.count(width, t - 1) if t else 0)
    zero = jnp.zeros((), dtype)
    low, top, radial = (jnp.zeros(s, dtype) for s in ((low, count), (top, count), (degree + 1, count)))
    return KeyMoments(low, top, radial, zero, jnp.zeros(width, dtype))


def add_keys(moments: KeyMoments, y: jax.Array, parts: list[jax.Array], weighted: jax.Array, live) -> KeyMoments:
    """Adds a block: y (d, n), its features by degree, w z (C, n), live (n,) false on tokens already counted."""
    degree = len(parts) - 1
    t = even_order(degree)
    norm = jnp.sqrt((y**2).sum(0))
    powers = jnp.stack([norm**m for m in range(degree + 1)])
    low = dot(jnp.concatenate(parts[: t + 1]), weighted.T)
    top = dot(parts[t] * powers[degree - t][None], weighted.T) if degree > t else low[-parts[t].shape[0] :]
    return KeyMoments(
        moments.low + low,
        moments.top + top,
        moments.radial + dot(powers, weighted.T),
        jnp.maximum(moments.reach, jnp.where(live, norm, 0).max()),
        jnp.maximum(moments.box, jnp.where(live, jnp.abs(y), 0).max(1)),
    )


class Setup(NamedTuple):
    """What the row bounds need to know about P. h, h_prime: envelopes of exp - P and exp - P' (None: Taylor)."""

    c: jax.Array
    h: tuple[jax.Array, jax.Array] | None
    h_prime: tuple[jax.Array, jax.Array] | None
    gamma: float
    jensen: bool


def row_range(x: jax.Array, reach: jax.Array, box: jax.Array) -> jax.Array:
    """R_i >= max_j |s_ij|, the smaller of the Euclidean and the box bound. x: (d, n) -> (1, n)."""
    return jnp.minimum(jnp.sqrt((x**2).sum(0, keepdims=True)) * reach, dot(box[None], jnp.abs(x)))


class Rows(NamedTuple):
    """Bounds for n queries and C columns. The first four are (C, n), the others (1, n)."""

    eta: jax.Array  # eta[z] >= sum_j |eps_j| z_j
    eta_prime: jax.Array
    mean: jax.Array  # >= E_f[z]
    size: jax.Array  # sums of absolute values over D: what rounding is proportional to
    certain: jax.Array  # lower bound of D_i over the sum of the weights: P certified positive where > 0
    slack: jax.Array  # b >= 1 / (1 + a_i)
    reach: jax.Array  # R_i


def _moments_at(setup: Setup, moments: KeyMoments, parts: list[jax.Array], norm: jax.Array):
    """Upper bounds, rounding included, of sum_j w z s^t, sum_j w z s^t (|x||y|)^{g-t} and sum_j w z P_{t-1}(s)."""
    degree, width, dtype = len(parts) - 1, parts[1].shape[0] if len(parts) > 1 else 0, norm.dtype
    t = even_order(degree)
    order, multinomial = monomials.tables(width, t)
    inner = monomials.count(width, t - 1) if t else 0
    factorial = [float(math.factorial(m)) for m in range(t + 1)]
    radial = [moments.radial[m][:, None] * norm**m for m in range(degree + 1)]
    top_scale = jnp.asarray(multinomial[inner:, None], dtype)
    mu_t = dot((moments.low[inner:] * top_scale).T, parts[t]) + setup.gamma * radial[t]
    nu_t = dot((moments.top * top_scale).T, parts[t]) * norm ** (degree - t) + setup.gamma * radial[degree]
    below = jnp.zeros_like(mu_t)
    if t:
        scale = jnp.asarray((multinomial[:inner] / np.array(factorial)[order[:inner].astype(int)])[:, None], dtype)
        below = dot((moments.low[:inner] * scale).T, jnp.concatenate(parts[:t]))
        below = below + setup.gamma * sum(radial[m] / factorial[m] for m in range(t))
    return mu_t, nu_t, below, radial


def _absolute(setup: Setup, radial: list[jax.Array], norm: jax.Array) -> jax.Array:
    """sum_j w z (P_abs + |P'|_abs)(|x||y|) up to the larger of the two: the scale of rounding errors, (C, n)."""
    c = jnp.abs(setup.c)
    size = c[0] * radial[0]
    for m in range(1, len(radial)):
        size = size + c[m] * radial[m]
        if setup.h is not None:  # Taylor's P' is a part of P
            size = size + (m * c[m]) * radial[m - 1]
    return size


def rows(setup: Setup, moments: KeyMoments, x: jax.Array, parts: list[jax.Array], d_sum, d_score) -> Rows:
    """Row bounds of a block of queries.

    x: (d, n); parts: its features by degree; d_sum (1, n): the computed D_i; d_score (1, n): rounding of the scores,
    which acts as one more error of exp, |e^{s + ds} - e^s| <= 2 ds e^s (`add_queries` counts it as rounding).
    """
    degree, gamma = len(parts) - 1, setup.gamma
    norm = jnp.sqrt((x**2).sum(0, keepdims=True))
    mu_t, nu_t, below, radial = _moments_at(setup, moments, parts, norm)
    reach = row_range(x, moments.reach, moments.box) * (1 + 8 * jnp.finfo(x.dtype).eps) + d_score
    phi = {degree + 1: polynomial.remainder_factor(degree + 1, reach)}
    for p in range(degree, even_order(degree) - 1, -1):
        phi[p] = 1 / math.factorial(p) + reach * phi[p + 1]
    exp_sum = below + phi[even_order(degree)] * mu_t
    if setup.h is None or setup.h_prime is None:
        eta = phi[degree + 1] * reach * nu_t
        eta_prime = phi[degree] * nu_t
    else:
        eta = setup.h[0] * radial[0] + setup.h[1] * reach * nu_t
        eta_prime = setup.h_prime[0] * radial[0] + setup.h_prime[1] * nu_t
    size = _absolute(setup, radial, norm)
    low = d_sum - gamma * size[:1]
    safe = jnp.where(low > 0, low, 1)
    eta, eta_prime = eta / safe, eta_prime / safe
    total = moments.radial[0, 0]
    floor = safe * (1 - eta[:1])  # Z_i = D_i (1 + a_i)
    if setup.jensen:
        floor = jnp.maximum(floor, total * jnp.exp(-4 * gamma * (1 + norm * moments.reach) - d_score))
    known = (low > 0) & (floor > 0)
    floor = jnp.where(known, floor, 1)
    unknown = jnp.where(known, 0, jnp.inf).astype(x.dtype)
    slack = (d_sum + gamma * size[:1]) / floor + unknown
    return Rows(eta, eta_prime, exp_sum / floor + unknown, size / safe, low / total, slack, reach)
