"""The bound of the value adapter: E_f[x] c - m(x) c~ = Dm c~ + m Dc + Dm Dc.

Dm = eps[x - m(x)] / (1 + a) = eps[x] - a E_f[x] is the error of the mean of a column x, Dc that of
the residual, which is the same thing for x = v.

    dA    x = X_V B, against c          dB    x = X_V, against A c

One column stands for X_V, X_V B, v and A v, so in units of sigma |Dm| and |Dc| have one bound:

    sqrt(eta1 eta[x^2]) + eta1 sqrt(E_f[x^2]),  or  b (sqrt(eta1 eta[x^2]) + eta1 |m(x)|)

if that is less, as it is unless b is large.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import column_lengths, frobenius, gamma
from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Shares, Terms, Visit
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem


class Moved(NamedTuple):
    """|Dm| and |Dc| of each query over sigma, and what their sums over queries are made of.

    Rows (1, n) in the sweep; in `finish` (n,), by the entry they were summed with, or ().
    """

    whole: Array
    rounding: Array  # of |Dm|
    rounding_c: Array  # of |Dc|
    both: Array  # |Dm| |Dc|
    both_rounding: Array
    # against A c, X_V keeps its mean: what follows is of centred X_V, `size` bounds its |m(x)|
    beside_size: Array  # |A Dc| (|m(x)| + |Dm|)
    beside_size_rounding: Array
    rounding_and_size: Array  # of |Dm|, and of the products with m(x)
    summed: Array  # gamma, of the sum over queries
    summed_m_xb: Array  # gamma times the largest |m(X_V B)|


class Sums(NamedTuple):
    """Sums over queries of what the entries of an array are multiplied by."""

    products: Float[Array, "entries parts"]  # by `_entries` and the fields of Moved


def _entries(grounds: Grounds) -> dict[str, slice]:
    """Where |c|, |m(X_V B)| and |A c| lie in `Sums.products`; 1 comes last."""
    r, dv = grounds.problem.adapters["value"].a.shape
    return {"c": slice(dv), "m_xb": slice(dv, dv + r), "ac": slice(dv + r, dv + 2 * r)}


def zero(problem: LoRAProblem) -> Sums:
    """The empty sums."""
    r, dv = problem.adapters["value"].a.shape
    return Sums(jnp.zeros((dv + 2 * r + 1, len(Moved._fields)), problem.dtype))


def _moved(grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], m_xb) -> Moved:
    """m_xb: the largest |m(X_V B)| of each query."""
    k, one, live = at["value"], at["one"], visit.live
    spread = one.eta * k.eta
    usual = rows.slack * (spread + rows.mass * k.tilt)
    whole = live * jnp.minimum(usual, spread + rows.mass * k.mean)
    rounding, rounding_c = (live * x for x in _rounding(grounds, visit, rows, at))
    # a bound of |m(x)|, and of |E_f[x]|, for centred x
    size = jnp.minimum(k.tilt, k.mean + whole) + whole + rounding
    summed = live * grounds.setup.gamma
    return Moved(
        whole=whole,
        rounding=rounding,
        rounding_c=rounding_c,
        both=whole * whole,
        both_rounding=rounding * whole + rounding_c * (whole + rounding),
        beside_size=whole * (size + whole),
        beside_size_rounding=rounding * whole + rounding_c * (size + whole),
        rounding_and_size=rounding + summed * size,
        summed=summed,
        summed_m_xb=summed * m_xb,
    )


def _rounding(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column]
) -> tuple[jax.Array, jax.Array]:
    """Rounding of |Dm| and of |Dc|: of sums and of D, of scores, of entries, of what comes after.

    What multiplies a rounded mean in |Dm| is counted too.
    """
    problem, sigma = grounds.problem, grounds.columns.sigma
    a, b = problem.adapters["value"].a, problem.adapters["value"].b
    k, one = at["value"], at["one"]
    sums = grounds.setup.gamma * one.size * k.size * (1 + one.size**2)
    sums = sums + 3 * visit.rounded.score * k.mean
    sums = sums + one.size**2 * grounds.floors.columns["value"]
    # the mean of X_V times B, which centred X_V B has lost
    xv_mean = frobenius(grounds.frame.xv_mean)
    of_mean = gamma(problem, b.shape[0] + 4) * xv_mean * frobenius(b)
    # the last additions that make c, and the product A c
    of_c = gamma(problem, 8) * (visit.scale_y + column_lengths(visit.m)) + grounds.floors.v_mean
    of_ac = of_c + gamma(problem, a.shape[1] + 2) * column_lengths(visit.c)
    of_ac = frobenius(a) / sigma["va"].min() * of_ac
    after = jnp.maximum(of_c / sigma["v"].min(), of_ac)
    grown = 1 + rows.slack * rows.mass
    return grown * (sums + of_mean / sigma["value.a"].min()), grown * (sums + after)


def shares(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], terms: Terms
) -> Shares:
    """What a block of queries adds to the error of both arrays."""
    del terms  # (*) is not used here
    a = grounds.problem.adapters["value"].a
    assert visit.m_xb is not None
    c = jnp.abs(visit.c)
    m_xb = jnp.abs(visit.m_xb)
    ac = jnp.abs(dot(a, visit.c))
    tops = [x.max(0, keepdims=True) for x in (c, m_xb, ac)]
    moved = _moved(grounds, visit, rows, at, tops[1])
    entries = jnp.concatenate([c, m_xb, ac, visit.live])
    sums = Sums(dot(entries, jnp.concatenate(moved).T))
    return Shares(sums, *_of_each(grounds, moved, *tops))


def _of_each(grounds: Grounds, moved: Moved, c, m_xb, ac) -> tuple[jax.Array, jax.Array]:
    """(truncation, rounding) of each query in dA and dB, its largest entries given."""
    sigma = grounds.columns.sigma
    x_a, v_a, x_b, v_b = (sigma[n].max() for n in ("value.a", "v", "value.b", "va"))
    mean = jnp.abs(grounds.frame.xv_mean).max()
    truncation_a = (x_a * c + v_a * m_xb) * moved.whole + x_a * v_a * moved.both
    rounding_a = x_a * c * moved.rounding + v_a * m_xb * moved.rounding_c
    rounding_a = rounding_a + x_a * v_a * moved.both_rounding + moved.summed_m_xb * c
    truncation_b = (x_b * ac + mean * v_b) * moved.whole + x_b * v_b * moved.beside_size
    rounding_b = x_b * ac * moved.rounding_and_size + x_b * v_b * moved.beside_size_rounding
    rounding_b = rounding_b + mean * (v_b * moved.rounding_c + moved.summed * ac)
    return (
        jnp.concatenate([truncation_a, truncation_b]),
        jnp.concatenate([rounding_a, rounding_b]),
    )


def finish(grounds: Grounds, sums: Sums) -> dict[str, tuple[Array, Array]]:
    """{half: (truncation, rounding)} of every entry, scale not applied."""
    sigma = grounds.columns.sigma
    of = {name: Moved(*sums.products[at].T) for name, at in _entries(grounds).items()}
    one = Moved(*sums.products[-1])
    # dA: rows are entries of X_V B, columns those of c
    x, v = sigma["value.a"][:, None], sigma["v"][None]
    truncation_a = x * of["c"].whole[None] + of["m_xb"].whole[:, None] * v + one.both * x * v
    rounding_a = x * of["c"].rounding[None] + of["m_xb"].rounding_c[:, None] * v
    rounding_a = rounding_a + one.both_rounding * x * v + of["c"].summed_m_xb[None]
    # dB: rows are entries of X_V, centred and its mean, columns those of A c
    x, v = sigma["value.b"][:, None], sigma["va"][None]
    mean = jnp.abs(grounds.frame.xv_mean)[:, None]
    truncation_b = x * of["ac"].whole[None] + mean * one.whole * v + one.beside_size * x * v
    rounding_b = x * of["ac"].rounding_and_size[None]
    rounding_b = rounding_b + mean * (one.rounding_c * v + of["ac"].summed[None])
    rounding_b = rounding_b + one.beside_size_rounding * x * v
    return {"a": (truncation_a, rounding_a), "b": (truncation_b, rounding_b)}
