"""The bound of the key adapter, whose gradient is beta sum_i (columns of X_K under p) Q_i^T.

    dA    k = X_K B,  x = Q             dB    k = X_K,  x = Q A^T

Keys are centred by construction, and so the derivative of f reaches them through P' at Q_i - nu and
through P at nu: two terms, of which the second has eta for eta'.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Terms, Visit, added
from lora_limits.linalg import dot, frobenius
from lora_limits.problem import LoRAProblem


class Sums(NamedTuple):
    """Sums over queries for one array, whose second index is that of x; in units of sigma."""

    truncation: Float[Array, " m"]  # sum_i |x_i| (terms in eps') + |nu| (terms in eps)
    squares: Float[Array, " m"]  # sum_i x_i^2 (rounding)^2


def zero(problem: LoRAProblem) -> dict[str, Sums]:
    """The empty sums of both arrays."""
    r, d = problem.adapters["key"].a.shape
    out = {}
    for half, m in (("a", d), ("b", r)):
        vector = jnp.zeros(m, problem.dtype)
        out[half] = Sums(vector, vector)
    return out


def add(
    grounds: Grounds,
    sums: dict[str, Sums],
    visit: Visit,
    rows: Rows,
    at: dict[str, Column],
    terms: Terms,
) -> dict[str, Sums]:
    """Adds a block of queries."""
    a = grounds.problem.adapters["key"].a
    q = visit.q
    nu = grounds.frame.nu
    assert q is not None
    # dK A^T from independent errors in dK: larger than from a common one
    independent = jnp.sqrt(dot(a**2, (jnp.abs(q) + jnp.abs(nu)[:, None]) ** 2))
    x_b = dot(a, q)
    nu_b = dot(a, nu)
    size_a = jnp.abs(q) + jnp.abs(nu)[:, None]
    size_b = jnp.maximum(jnp.abs(x_b) + jnp.abs(nu_b)[:, None], independent)
    half_a = (q, nu, size_a, visit.rounded.query)
    half_b = (x_b, nu_b, size_b, visit.rounded.query * frobenius(a))
    return {
        half: _add(grounds, sums[half], visit, rows, terms, f"key.{half}", at, *parts)
        for half, parts in (("a", half_a), ("b", half_b))
    }


def _add(grounds: Grounds, sums: Sums, visit, rows, terms, name, at, x, nu, size, moved) -> Sums:
    k = at[name]
    live = visit.live
    # terms of (*) that P and P' share, and a G~ bounded by what G itself can be
    rest = terms.second(k)
    rest = rest + terms.root1**2 * (terms.cn + rows.slack * terms.dc) * terms.fz * k.mean
    prime = rest + terms.cn * terms.z_prime * k.eta_prime
    plain = rest + terms.cn * terms.z * k.eta
    truncation = dot(jnp.abs(x), (live * prime)[0]) + jnp.abs(nu) * (live * plain).sum()
    rounded = terms.rounded(k, grounds.floors.columns.get(name, 0.0))
    squares = dot(size**2, (live * rounded**2)[0])
    squares = squares + (live * (moved * terms.cn * terms.fz * k.mean) ** 2).sum()
    return added(sums, truncation, squares)


def finish(grounds: Grounds, half: str, sums: Sums) -> tuple[Array, Array]:
    """(truncation, sum of squares of rounding) of every entry, scale not applied."""
    sigma = grounds.frame.beta * grounds.columns.sigma[f"key.{half}"].max()
    return sigma * sums.truncation, sigma**2 * sums.squares
