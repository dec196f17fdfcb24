"""Bounds for every query, from moments over keys of the certificate's columns (see bound.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import column_lengths
from lora_limits.coordinates.frame import row_range
from lora_limits.linalg import dot, down
from lora_limits.polynomial import monomials, series

FIRST_ORDER = 1e-3  # the most that anything taken for small may be
OUTWARD = 1 + 1e-6  # the rounding of the bound's own sums, all of them of non-negative terms


def even_order(degree: int) -> int:
    """t, the largest even number <= degree: the power of s whose moments are read exactly."""
    return degree - degree % 2


def whole(degree: int) -> bool:
    """Whether t = g >= 2: the moments of s^t then come with those of the gradient itself."""
    return degree >= 2 and degree % 2 == 0


class KeyMoments(NamedTuple):
    """Sums over keys, all of non-negative columns z: what `rows` needs to bound any query."""

    low: Float[Array, "low columns"]  # sum_j w phi(y) z, phi of degree <= max(g - 1, 0)
    top: Float[Array, "top columns"]  # sum_j w |y|^{g-t} phi(y) z, phi of degree t
    radial: Float[Array, "powers columns"]  # sum_j w |y|^m z, m = 0 .. g
    second: Float[Array, "d d"]  # sum_j w y y^T
    mean: Float[Array, " d"]  # sum_j w y
    offset: Float[Array, " columns"]  # max over entries of |sum_j w k| / sigma of every column
    reach: Float[Array, ""]  # max_j |y_j|
    box: Float[Array, " d"]  # max_j |y_j| by coordinate
    lightest: Float[Array, ""]  # min_j w_j


class Setup(NamedTuple):
    """What the row bounds need to know about P. h, h_prime: envelopes of exp - P and exp - P'."""

    c: Float[Array, " degree_and_1"]  # coefficients of P
    h: tuple[jax.Array, jax.Array] | None  # None: Taylor's, in closed form
    h_prime: tuple[jax.Array, jax.Array] | None
    gamma: float  # rounding of a sum, relative to the sum of absolute values

    @property
    def degree(self) -> int:
        return self.c.shape[0] - 1


class Rows(NamedTuple):
    """Bounds for n queries: those up to `centre` are roots, as Cauchy-Schwarz wants them."""

    eta: Float[Array, "columns n"]  # eta[z] >= sum_j |eps_j| z_j
    eta_prime: Float[Array, "columns n"]  # the same for eps'
    mean: Float[Array, "columns n"]  # >= E_f[z]
    size: Float[Array, "columns n"]  # absolute sums over D: what rounding is proportional to
    tilt: Float[Array, "columns n"]  # >= |m(x)|, z being the largest square of such x
    centre: Float[Array, "columns n"]  # >= |E_f[x]|
    mass: Float[Array, "1 n"]  # eta[1] itself
    certain: Float[Array, "1 n"]  # D_i over the sum of the weights, from below
    slack: Float[Array, "1 n"]  # b >= 1 / (1 + a_i)


class Column(NamedTuple):
    """The bounds of one column, as in `Rows`."""

    eta: Float[Array, "1 n"]
    eta_prime: Float[Array, "1 n"]
    mean: Float[Array, "1 n"]
    size: Float[Array, "1 n"]
    tilt: Float[Array, "1 n"]
    centre: Float[Array, "1 n"]


def by_name(rows: Rows, names: tuple[str, ...], floors: dict[str, jax.Array]) -> dict[str, Column]:
    """The bounds of each column under its name, of the true column and not of the rounded one.

    names: of `columns.names`. floors: rounding of an entry of a column, in units of its sigma.
    """
    out = {}
    mass = rows.size[:1] ** 2
    for i, name in enumerate(names):
        k = Column(*(bound[i : i + 1] for bound in rows[: len(Column._fields)]))
        if name in floors:
            # Minkowski's inequality in each measure: the root for k + dk from those for k and dk
            k = Column(
                eta=k.eta + floors[name] * rows.eta[:1],
                eta_prime=k.eta_prime + floors[name] * rows.eta_prime[:1],
                mean=k.mean + floors[name] * rows.mean[:1],
                size=k.size + floors[name] * rows.size[:1],
                tilt=k.tilt + floors[name] * mass,
                centre=k.centre + floors[name] * rows.mean[:1],
            )
        out[name] = k
    return out


def powers(norm: Float[Array, "1 n"], degree: int) -> Float[Array, "powers n"]:
    """|y|^0 .. |y|^degree."""
    out = [jnp.ones_like(norm)]
    for _ in range(degree):
        out.append(out[-1] * norm)
    return jnp.concatenate(out)


class Polynomials(NamedTuple):
    """What `rows` wants of the features of a query; their values where k = m = n, the queries."""

    prime: Float[Array, "columns k"]  # sum_j w z P'(s) of every column z, from degrees below g
    even: Float[Array, "columns m"]  # sum_j w z |y|^{g-t} s^t, from degree t


def polynomials(setup: Setup, moments: KeyMoments, width: int) -> Polynomials:
    """The coefficients, multinomials included. O(k columns)."""
    degree = setup.degree
    dtype = setup.c.dtype
    t = even_order(degree)
    below = monomials.count(width, max(degree - 1, 0))
    order, multinomial = monomials.tables(width, degree)
    of_degree_t = slice(monomials.count(width, t - 1), monomials.count(width, t))
    prime = series.derivative(setup.c) if degree else jnp.zeros_like(setup.c)
    prime = prime[order[:below].astype(np.int32)] * jnp.asarray(multinomial[:below], dtype)
    even = jnp.asarray(multinomial[of_degree_t, None], dtype)
    return Polynomials((moments.low * prime[:, None]).T, (moments.top * even).T)


def evaluate(
    polynomials: Polynomials, degree: int, parts: list[Float[Array, "_ n"]]
) -> Polynomials:
    """The values at n queries; parts: their features by degree, up to max(g - 1, t) at least."""
    below = jnp.concatenate(parts[: max(degree, 1)])
    even = parts[even_order(degree)]
    return Polynomials(dot(polynomials.prime, below), dot(polynomials.even, even))


class _Absolute(NamedTuple):
    """Coefficients, in powers of |x|, of sums over keys of absolute values."""

    size: Float[Array, "powers columns"]  # behind P and P' together
    prime: Float[Array, "powers columns"]  # behind P' alone
    last: Float[Array, "1 columns"]  # the moment of the highest power


def _absolute(setup: Setup, radial: Float[Array, "powers columns"]) -> _Absolute:
    plain = jnp.abs(setup.c)[:, None] * radial
    n = np.arange(1, radial.shape[0], dtype=radial.dtype)[:, None]
    prime = jnp.abs(setup.c)[1:, None] * n * radial[:-1]
    prime = jnp.concatenate([prime, jnp.zeros_like(radial[:1])])
    # Taylor's P' is a part of P
    size = plain if setup.h is None else plain + prime
    return _Absolute(size, prime, radial[-1:])


def rows(
    setup: Setup,
    moments: KeyMoments,
    x: Float[Array, "d n"],
    values: Polynomials,
    d_sum: Float[Array, "1 n"],
    d_score: Float[Array, "1 n"],
) -> Rows:
    """Row bounds of a block of queries x.

    values: of `evaluate` at x. d_sum: the computed D_i. d_score: rounding of the scores, which
    acts as one more error of exp, |e^{s + ds} - e^s| <= 2 ds e^s (`terms` counts it as rounding).
    """
    degree, gamma = setup.degree, setup.gamma
    count = moments.radial.shape[1]
    norm = column_lengths(x)
    reach = row_range(x, moments.reach, moments.box)
    # R_i, with the rounding of the scores
    reach = reach * (1 + 8 * jnp.finfo(x.dtype).eps) + d_score
    phi = series.remainder_factor(degree + 1, reach)
    score_size = _score_size(setup, moments, x, norm, reach, d_score)
    norm, reach, phi, score_size = settle(norm, reach, phi, score_size)
    # sums of absolute values, by powers of |x|
    absolute = _absolute(setup, moments.radial)
    p = powers(norm, degree)
    both = dot(jnp.concatenate([absolute.size, gamma * absolute.prime], 1).T, p)
    size = both[:count]
    # sum_j w z P'(s), from above
    prime = values.prime + both[count:]
    # sum_j w z |s|^g <= sum_j w z s^t (|x||y|)^{g-t}, from above
    nu = values.even * p[degree - even_order(degree)][None] + gamma * absolute.last.T * p[-1:]
    # D_i, from below
    low = d_sum - gamma * size[:1]
    # what follows is of first order in the rounding of D_i
    sure = gamma * size[:1] < FIRST_ORDER * d_sum
    safe = jnp.where(sure, low, 1)
    flat = moments.radial[0][:, None]
    h, h_prime = _envelopes(setup, reach, phi)
    # eta[1] = sum_j |eps_j|
    mass = (h[0] * flat[:1] + h[1] * reach * nu[:1]) / safe
    # Z_i = D_i (1 + a_i), from below
    floor = safe * (1 - mass * OUTWARD)
    # Jensen: Z_i >= sum_j w_j exp(x_i . y), y the weighted mean of the keys, whatever it is
    total = moments.radial[0, 0]
    tilted = dot(moments.mean[None] / total, x)
    tilted = tilted - 2 * gamma * (1 + norm * moments.reach) - d_score
    floor = jnp.maximum(floor, (1 - 2 * gamma) * total * jnp.exp(tilted))
    known = sure & (floor > 0)
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
    eta = jnp.sqrt(eta * inverse)
    eta_prime = jnp.sqrt(eta_prime * inverse)
    mean = jnp.sqrt(mean)
    size = jnp.sqrt(size * inverse)
    # |m(x)| <= |sum_j w x| / D + sum_j w |e^s - 1||x| / D + sum_j |eps_j||x|
    offset = moments.offset[:, None] + 2 * gamma * jnp.sqrt(total * flat)
    tilt = inverse * (offset + score_size * jnp.sqrt(flat)) + eta[:1] * eta
    centre = jnp.minimum(mean, tilt + slack * (eta[:1] * eta + mass * tilt))
    certain = low / total
    return Rows(eta, eta_prime, mean, size, tilt, centre, mass, certain, slack)


def _envelopes(setup: Setup, reach, phi):
    """((h0, h1) of exp - P over |s|^{g+1}, (h0, h1) of exp - P' over |s|^g)."""
    if setup.h is None or setup.h_prime is None:
        by_one_less = 1 / math.factorial(setup.degree) + reach * phi
        return (0.0, phi), (0.0, by_one_less)
    return setup.h, setup.h_prime


def settle(*rows: Float[Array, "1 n"]) -> tuple[Float[Array, "1 n"], ...]:
    """The same rows, computed once: by a product, which XLA does not fuse.

    Left to itself its CPU compiler repeats the long chains behind them in every consumer, once for
    each column. An infinite entry turns the others of its token into NaN, which the sums take as
    not certified.
    """
    return jax.lax.optimization_barrier(rows)


def _score_size(setup: Setup, moments: KeyMoments, x, norm, reach, d_score) -> jax.Array:
    """(1, n), >= sqrt(sum_j w (e^s - 1)^2), by |e^s - 1| <= |s| (e^R - 1) / R.

    Columns are centred, and feel no more of the score than this.
    """
    square = down(x * dot(moments.second, x))
    square = jnp.maximum(square, 0) + setup.gamma * jnp.trace(moments.second) * norm**2
    root = jnp.sqrt(moments.radial[0, 0])
    r = jnp.maximum(reach, jnp.finfo(x.dtype).eps)
    return (jnp.sqrt(square) + d_score * root) * jnp.expm1(r) / r + setup.gamma * root
