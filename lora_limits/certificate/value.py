"""The bound of the value adapter: E_f[x] c - m(x) c~ = Dm c~ + m Dc + Dm Dc.

Dm = eps[x - m(x)] / (1 + a) = eps[x] - a E_f[x] is the error of the mean of a column x, Dc that of
the residual, which is the same thing for x = v.

    dA    x = X_V B, against c          dB    x = X_V, against A c
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import unit_roundoff
from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Visit, added
from lora_limits.linalg import column_norms, dot, frobenius
from lora_limits.problem import LoRAProblem


class SumsA(NamedTuple):
    """Sums over queries for dA (n rows of x, m columns of c), Dm and Dc in units of their sigma."""

    mean: Float[Array, " m"]  # sum_i |c| shared |Dm|
    mean_squares: Float[Array, " m"]  # its rounding
    residual: Float[Array, " n"]  # sum_i |m(x)| shared |Dc|
    residual_squares: Float[Array, " n"]  # its rounding
    both: Float[Array, ""]  # sum_i |Dm| |Dc|, rounding included
    own: Float[Array, "n m"]  # the parts of |Dm| and |Dc| that are each entry's own


class SumsB(NamedTuple):
    """Sums over queries for dB (x has d_in rows, A c has m columns), in units of their sigma.

    X_V keeps its mean here: m(x) is |mean of X_V| and what is left of it after centring.
    """

    mean: Float[Array, " m"]  # sum_i |A c| |Dm|, and the own part of A Dc against centred m(x)
    mean_squares: Float[Array, " m"]  # its rounding
    residual: Float[Array, ""]  # sum_i shared |A Dc|, against the mean of X_V
    residual_squares: Float[Array, ""]  # its rounding
    both: Float[Array, ""]  # sum_i |Dm| |A Dc| and |m(x)| |A Dc| for centred x
    both_squares: Float[Array, ""]  # its rounding
    product_squares: Float[Array, " m"]  # rounding of the product against the mean of X_V
    centred_squares: Float[Array, " m"]  # the same against centred x
    own: Float[Array, " m"]  # the own part of A Dc, against the mean of X_V


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
            mean_squares=nothing(dv),
            residual=nothing(r),
            residual_squares=nothing(r),
            both=nothing(),
            own=nothing(r, dv),
        ),
        "b": SumsB(
            mean=nothing(r),
            mean_squares=nothing(r),
            residual=nothing(),
            residual_squares=nothing(),
            both=nothing(),
            both_squares=nothing(),
            product_squares=nothing(r),
            centred_squares=nothing(r),
            own=nothing(r),
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


def _rounded(grounds: Grounds, visit: Visit, at: dict[str, Column], name: str):
    """Rounding of the mean of a column: of its sums, of the scores, of the column's own entries."""
    one = at["one"]
    k = at[name]
    row = grounds.setup.gamma * one.size * k.size + 2 * visit.rounded.score * k.mean
    return row + one.size**2 * grounds.floors.columns.get(name, 0.0)


def add(grounds: Grounds, sums: dict, visit: Visit, rows: Rows, at: dict[str, Column]) -> dict:
    """Adds a block of queries."""
    floors = grounds.floors
    # the last additions that make c
    d_c = 4 * unit_roundoff(grounds.problem) * (visit.scale_y + column_norms(visit.m))
    d_c = d_c + floors.v_mean
    return {
        "a": _add_a(grounds, sums["a"], visit, rows, at, d_c),
        "b": _add_b(grounds, sums["b"], visit, rows, at, d_c),
    }


def _add_a(grounds: Grounds, sums: SumsA, visit: Visit, rows, at, d_c) -> SumsA:
    gamma = grounds.setup.gamma
    live = visit.live
    sigma = grounds.columns.sigma
    xv_mean = grounds.frame.xv_mean
    b = grounds.problem.adapters["value"].b
    assert visit.m_xb is not None
    # rounding of the mean of X_V times B, which centred X_V B has lost
    unit = unit_roundoff(grounds.problem)
    d_x = unit * xv_mean.shape[0] ** 0.5 * frobenius(xv_mean) * frobenius(b)
    x = _moved(at["value.a"], at["one"], rows, live)
    v = _moved(at["v"], at["one"], rows, live)
    x_rounded = _rounded(grounds, visit, at, "value.a")
    v_rounded = _rounded(grounds, visit, at, "v") + gamma + d_c / sigma["v"].min()
    # rounding of the product itself: gamma |m_xb||c|
    largest = gamma * (jnp.abs(visit.c) / sigma["v"][:, None]).max(0, keepdims=True)
    on_c = x_rounded**2 + (d_x / sigma["value.a"].min()) ** 2
    on_x = v_rounded**2 + largest**2
    c = jnp.abs(visit.c)
    size = jnp.abs(visit.m_xb)
    centred = jnp.abs(visit.m_xb - dot(b.T, xv_mean)[:, None])
    return added(
        sums,
        dot(c, (live * x.shared)[0]),
        dot(visit.c**2, (live * on_c)[0]),
        dot(size, (live * v.shared)[0]),
        dot(visit.m_xb**2, (live * on_x)[0]),
        (live * (x.whole + x_rounded) * (v.whole + v_rounded)).sum(),
        dot(x.own * centred, c.T) + dot(v.own * size, jnp.abs(visit.m).T),
    )


def _add_b(grounds: Grounds, sums: SumsB, visit: Visit, rows, at, d_c) -> SumsB:
    gamma = grounds.setup.gamma
    live = visit.live
    a = grounds.problem.adapters["value"].a
    x = _moved(at["value.b"], at["one"], rows, live)
    v = _moved(at["va"], at["one"], rows, live)
    x_rounded = _rounded(grounds, visit, at, "value.b")
    v_rounded = _rounded(grounds, visit, at, "va") + gamma
    v_rounded = v_rounded + d_c * frobenius(a) / grounds.columns.sigma["va"].min()
    ca = dot(a, visit.c)
    m = jnp.abs(dot(a, visit.m))
    # (A c)^2 and the square of its rounding over gamma
    per_entry = unit_roundoff(grounds.problem) * a.shape[1] ** 0.5 / gamma
    ca_square = ca**2 + (frobenius(a) * column_norms(visit.c) * per_entry) ** 2
    # a bound of |m(x)|, and of |E_f[x]|, for centred x
    size = jnp.minimum(at["value.b"].tilt, at["value.b"].mean + x.whole) + x.whole + x_rounded
    both = v.shared * (size + x.whole + x_rounded) + v_rounded * x.whole
    return added(
        sums,
        dot(jnp.abs(ca), (live * x.whole)[0]) + dot(m, (v.own * size)[0]),
        dot(ca**2, (live * x_rounded**2)[0]),
        (live * v.shared).sum(),
        (live * v_rounded**2).sum(),
        (live * both).sum(),
        (live * (v_rounded * size) ** 2).sum(),
        gamma**2 * dot(ca_square, live[0]),
        gamma**2 * dot(ca_square, (live * size**2)[0]),
        dot(m, v.own[0]),
    )


def finish(grounds: Grounds, half: str, sums) -> tuple[Array, Array]:
    """(truncation, sum of squares of rounding) of every entry, scale not applied."""
    sigma = grounds.columns.sigma
    sx = sigma[f"value.{half}"][:, None]
    if half == "a":
        sv = sigma["v"][None]
        worst = sx * sums.mean[None] + sums.residual[:, None] * sv + sums.both * sx * sv + sums.own
        squares = sx**2 * sums.mean_squares[None] + sums.residual_squares[:, None] * sv**2
        return worst, squares
    sv = sigma["va"][None]
    mean = jnp.abs(grounds.frame.xv_mean)[:, None]
    worst = sx * sums.mean[None] + mean * (sums.residual * sv + sums.own[None])
    worst = worst + sums.both * sx * sv
    squares = sx**2 * (sums.mean_squares + sums.centred_squares)[None]
    squares = squares + mean**2 * (sums.residual_squares * sv**2 + sums.product_squares[None])
    return worst, squares + sums.both_squares * (sx * sv) ** 2
