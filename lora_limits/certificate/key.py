"""The bound of the key adapter, whose gradient is beta sum_i (columns of X_K under p) Q_i^T.

    dA    k = X_K B,  x = Q             dB    k = X_K,  x = Q A^T

Keys are centred by construction, and so the derivative of f reaches them through P' at Q_i - nu and
through P at nu: two terms, of which the second has eta for eta'.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import column_lengths, frobenius
from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Shares, Terms, Visit
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem


class Sums(NamedTuple):
    """Sums over queries for one array, whose second index is that of x; in units of sigma."""

    truncation: Float[Array, " m"]  # sum_i |x_i| (terms in eps') + |nu| (terms in eps)
    rounding: Float[Array, " m"]  # sum_i |x_i| (rounding of the row) + (rounding of x_i) |G_i|


def zero(problem: LoRAProblem) -> dict[str, Sums]:
    """The empty sums of both arrays."""
    r, d = problem.adapters["key"].a.shape
    out = {}
    for half, m in (("a", d), ("b", r)):
        vector = jnp.zeros(m, problem.dtype)
        out[half] = Sums(vector, vector)
    return out


def shares(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], terms: Terms
) -> dict[str, Shares]:
    """What a block of queries adds to the error of both arrays."""
    frame = grounds.frame
    a = grounds.problem.adapters["key"].a
    q = visit.q
    assert q is not None
    nu = jnp.abs(frame.nu)
    # dK comes from dy by to_y^T: entries of to_y^T x_i in absolute values, over beta
    through_y = column_lengths(frame.to_y).T / frame.beta * column_lengths(visit.x)
    size_a = jnp.abs(q) + through_y + nu[:, None]
    size_b = dot(jnp.abs(a), size_a)
    moved = visit.rounded.query
    half_a = (jnp.abs(q), nu, size_a, moved)
    half_b = (jnp.abs(dot(a, q)), jnp.abs(dot(a, frame.nu)), size_b, moved * frobenius(a))
    return {
        half: _shares(grounds, visit, rows, terms, f"key.{half}", at, *parts)
        for half, parts in (("a", half_a), ("b", half_b))
    }


def _shares(grounds, visit, rows, terms, name, at, x, nu, size, moved) -> Shares:
    k = at[name]
    live = visit.live
    # terms of (*) that P and P' share, and a G~ bounded by what G itself can be
    rest = terms.second(k)
    rest = rest + terms.root1**2 * (terms.cn + rows.slack * terms.dc) * terms.fz * k.mean
    prime = live * (rest + terms.cn * terms.z_prime * k.eta_prime)
    plain = live * (rest + terms.cn * terms.z * k.eta)
    size_x = x + moved
    rounded = live * rows.slack * terms.rounded(k, grounds.floors.columns[name])
    # a rounded query (and its centre) times the row itself
    of_query = 2 * moved * (terms.cn + rows.slack * terms.dc) * terms.fz * k.mean
    of_query = live * of_query
    sums = Sums(
        truncation=dot(size_x, prime[0]) + nu * plain.sum(),
        rounding=dot(size, rounded[0]) + of_query.sum(),
    )
    sigma = grounds.frame.beta * grounds.columns.sigma[name].max()
    truncation = size_x.max(0, keepdims=True) * prime + nu.max() * plain
    rounding = size.max(0, keepdims=True) * rounded + of_query
    return Shares(sums, sigma * truncation, sigma * rounding)


def finish(grounds: Grounds, half: str, sums: Sums) -> tuple[Array, Array]:
    """(truncation, rounding) of every entry, (1, m): columns alike throughout; scale not applied."""
    sigma = grounds.frame.beta * grounds.columns.sigma[f"key.{half}"].max()
    return sigma * sums.truncation[None], sigma * sums.rounding[None]
