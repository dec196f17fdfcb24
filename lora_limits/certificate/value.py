"""The bound of the value adapter: E_f[x] c - m(x) c~ = Dm c~ + m Dc + Dm Dc.

Dm = eps[x - m(x)] / (1 + a) = eps[x] - a E_f[x] is the error of the mean of a column x, Dc that of
the residual, which is the same thing for x = v.

    dA    x = X_V B, against c          dB    x = X_V, against A c
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import column_lengths, frobenius, gamma
from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Shares, Terms, Visit
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem


class SumsA(NamedTuple):
    """Sums over queries for dA (n rows of x, m columns of c), Dm and Dc in units of their sigma."""

    mean: Float[Array, " m"]  # sum_i |c| shared |Dm|
    mean_rounding: Float[Array, " m"]
    residual: Float[Array, " n"]  # sum_i |m(x)| shared |Dc|
    residual_rounding: Float[Array, " n"]
    both: Float[Array, ""]  # sum_i |Dm| |Dc|
    both_rounding: Float[Array, ""]
    own: Float[Array, "n m"]  # the parts of |Dm| and |Dc| that are each entry's own
    own_rounding: Float[Array, "n m"]  # of the products and of their sum over queries


class SumsB(NamedTuple):
    """Sums over queries for dB (x has d_in rows, A c has m columns), in units of their sigma.

    X_V keeps its mean here: m(x) is |mean of X_V| and what is left of it after centring.
    """

    mean: Float[Array, " m"]  # sum_i |A c| |Dm|, and the own part of A Dc against centred m(x)
    mean_rounding: Float[Array, " m"]  # of these, and of the products against centred x
    residual: Float[Array, ""]  # sum_i shared |A Dc|, against the mean of X_V
    residual_rounding: Float[Array, ""]
    both: Float[Array, ""]  # sum_i |Dm| |A Dc| and |m(x)| |A Dc| for centred x
    both_rounding: Float[Array, ""]
    own: Float[Array, " m"]  # the own part of A Dc, against the mean of X_V
    own_rounding: Float[Array, " m"]  # of the products against the mean of X_V


class _Moved(NamedTuple):
    """|Dm| of a column over its scale, in the better of two ways."""

    shared: Float[Array, "1 n"]  # the part that all entries share
    own: Float[Array, "1 n"]  # the factor of |m(x)|, entry by entry
    whole: Float[Array, "1 n"]  # both parts


def zero(problem: LoRAProblem) -> dict[str, SumsA | SumsB]:
    """The empty sums of both arrays."""
    r, dv = problem.adapters["value"].a.shape

    def nothing(*shape):
        return jnp.zeros(shape, problem.dtype)

    return {
        "a": SumsA(
            mean=nothing(dv),
            mean_rounding=nothing(dv),
            residual=nothing(r),
            residual_rounding=nothing(r),
            both=nothing(),
            both_rounding=nothing(),
            own=nothing(r, dv),
            own_rounding=nothing(r, dv),
        ),
        "b": SumsB(
            mean=nothing(r),
            mean_rounding=nothing(r),
            residual=nothing(),
            residual_rounding=nothing(),
            both=nothing(),
            both_rounding=nothing(),
            own=nothing(r),
            own_rounding=nothing(r),
        ),
    }


def _moved(k: Column, one: Column, rows: Rows, live) -> _Moved:
    """|Dm| <= b (sqrt(eta1 eta[x^2]) + eta1 |m(x)|), the first part shared, the second each entry's.

    Or sqrt(eta1 eta[x^2]) + eta1 sqrt(E_f[x^2]), all shared, which is less where b is large.
    """
    spread = one.eta * k.eta
    first = rows.slack * (spread + rows.mass * k.tilt)
    second = spread + rows.mass * k.mean
    less = first < second
    return _Moved(
        shared=jnp.where(less, rows.slack * spread, second),
        own=jnp.where(less, live * rows.slack * rows.mass, 0),
        whole=jnp.where(less, first, second),
    )


def _rounded(
    grounds: Grounds,
    visit: Visit,
    rows: Rows,
    at: dict[str, Column],
    name: str,
    more: Array | float = 0.0,
):
    """Rounding of the mean of a column: of its sums and of D, of the scores, of its own entries.

    more: other rounding of it. What multiplies the rounded mean in |Dm| is counted too.
    """
    one = at["one"]
    k = at[name]
    sums = grounds.setup.gamma * one.size * k.size * (1 + one.size**2)
    sums = sums + 3 * visit.rounded.score * k.mean + one.size**2 * grounds.floors.columns[name]
    return (1 + rows.slack * rows.mass) * (sums + more)


def shares(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], terms: Terms
) -> dict[str, Shares]:
    """What a block of queries adds to the error of both arrays."""
    del terms  # (*) is not used here
    # the last additions that make c
    m = column_lengths(visit.m)
    d_c = gamma(grounds.problem, 8) * (visit.scale_y + m) + grounds.floors.v_mean
    return {
        "a": _shares_a(grounds, visit, rows, at, d_c),
        "b": _shares_b(grounds, visit, rows, at, d_c),
    }


def _top(x: Float[Array, "e n"]) -> Float[Array, "1 n"]:
    """The largest entry of every query."""
    return x.max(0, keepdims=True)


def _shares_a(grounds: Grounds, visit: Visit, rows, at, d_c) -> Shares:
    sigma = grounds.columns.sigma
    live = visit.live
    xv_mean = grounds.frame.xv_mean
    b = grounds.problem.adapters["value"].b
    assert visit.m_xb is not None
    # rounding of the mean of X_V times B, which centred X_V B has lost
    d_x = gamma(grounds.problem, xv_mean.shape[0] + 4) * frobenius(xv_mean) * frobenius(b)
    x = _moved(at["value.a"], at["one"], rows, live)
    v = _moved(at["v"], at["one"], rows, live)
    x_rounded = _rounded(grounds, visit, rows, at, "value.a", d_x / sigma["value.a"].min())
    v_rounded = _rounded(grounds, visit, rows, at, "v", d_c / sigma["v"].min())
    c = jnp.abs(visit.c)
    size = jnp.abs(visit.m_xb)
    centred = jnp.abs(visit.m_xb - dot(b.T, xv_mean)[:, None])
    both = live * x.whole * v.whole
    cross = live * (x.whole * v_rounded + x_rounded * (v.whole + v_rounded))
    summed = grounds.setup.gamma
    sums = SumsA(
        mean=dot(c, (live * x.shared)[0]),
        mean_rounding=dot(c, (live * x_rounded)[0]),
        residual=dot(size, (live * v.shared)[0]),
        residual_rounding=dot(size, (live * v_rounded)[0]),
        both=both.sum(),
        both_rounding=cross.sum(),
        own=dot(x.own * centred, c.T) + dot(v.own * size, jnp.abs(visit.m).T),
        own_rounding=summed * dot(live * size, c.T),
    )
    # of each query: all of |Dm| and |Dc|, which leaves no part to the entries
    sx, sv = sigma["value.a"].max(), sigma["v"].max()
    truncation = sx * _top(c) * x.whole + sv * _top(size) * v.whole
    rounding = sx * _top(c) * x_rounded + sv * _top(size) * v_rounded
    rounding = rounding + summed * _top(size) * _top(c)
    return Shares(
        sums,
        live * truncation + sx * sv * both,
        live * rounding + sx * sv * cross,
    )


def _shares_b(grounds: Grounds, visit: Visit, rows, at, d_c) -> Shares:
    sigma = grounds.columns.sigma
    live = visit.live
    a = grounds.problem.adapters["value"].a
    x = _moved(at["value.b"], at["one"], rows, live)
    v = _moved(at["va"], at["one"], rows, live)
    x_rounded = _rounded(grounds, visit, rows, at, "value.b")
    # A c: of c, of the product
    d_ca = d_c + gamma(grounds.problem, a.shape[1] + 2) * column_lengths(visit.c)
    more = frobenius(a) * d_ca / sigma["va"].min()
    v_rounded = _rounded(grounds, visit, rows, at, "va", more)
    ca = jnp.abs(dot(a, visit.c))
    m = jnp.abs(dot(a, visit.m))
    # a bound of |m(x)|, and of |E_f[x]|, for centred x
    size = jnp.minimum(at["value.b"].tilt, at["value.b"].mean + x.whole) + x.whole + x_rounded
    both = live * v.whole * (size + x.whole)
    cross = live * (v_rounded * (size + x.whole) + v.whole * x_rounded)
    # the sum over queries of m(x) c~ A^T, for centred x and for its mean
    summed = grounds.setup.gamma
    sums = SumsB(
        mean=dot(ca, (live * x.whole)[0]) + dot(m, (v.own * size)[0]),
        mean_rounding=dot(ca, (live * (x_rounded + summed * size))[0]),
        residual=(live * v.shared).sum(),
        residual_rounding=(live * v_rounded).sum(),
        both=both.sum(),
        both_rounding=cross.sum(),
        own=dot(m, v.own[0]),
        own_rounding=summed * dot(ca, live[0]),
    )
    # of each query: all of |Dm| and |A Dc|, which leaves no part to the entries
    sx, sv = sigma["value.b"].max(), sigma["va"].max()
    mean = jnp.abs(grounds.frame.xv_mean).max()
    truncation = sx * _top(ca) * x.whole + mean * sv * v.whole
    rounding = sx * _top(ca) * (x_rounded + summed * size)
    rounding = rounding + mean * (sv * v_rounded + summed * _top(ca))
    return Shares(
        sums,
        live * truncation + sx * sv * both,
        live * rounding + sx * sv * cross,
    )


def finish(grounds: Grounds, half: str, sums) -> tuple[Array, Array]:
    """(truncation, rounding) of every entry, scale not applied."""
    sigma = grounds.columns.sigma
    sx = sigma[f"value.{half}"][:, None]
    if half == "a":
        sv = sigma["v"][None]
        worst = sx * sums.mean[None] + sums.residual[:, None] * sv + sums.both * sx * sv
        rounding = sx * sums.mean_rounding[None] + sums.residual_rounding[:, None] * sv
        return worst + sums.own, rounding + sums.both_rounding * sx * sv + sums.own_rounding
    sv = sigma["va"][None]
    mean = jnp.abs(grounds.frame.xv_mean)[:, None]
    worst = sx * sums.mean[None] + mean * (sums.residual * sv + sums.own[None])
    rounding = sx * sums.mean_rounding[None]
    rounding = rounding + mean * (sums.residual_rounding * sv + sums.own_rounding[None])
    return worst + sums.both * sx * sv, rounding + sums.both_rounding * sx * sv
