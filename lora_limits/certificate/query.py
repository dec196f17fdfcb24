"""The bound of the query adapter: G - G~ = ((*) - a G~) / (1 + a), row by row, times |u_i|.

dA    u = X_Q B,  k = K             dB    u = X_Q,  k = K A^T
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import unit_roundoff
from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Terms, Visit, added
from lora_limits.linalg import column_norms, dot, frobenius
from lora_limits.problem import LoRAProblem


class Sums(NamedTuple):
    """Sums over queries for one array, whose first index is that of u; all in units of sigma."""

    truncation: Float[Array, " n"]  # sum_i |u_i| |G - G~|_i
    squares: Float[Array, " n"]  # sum_i u_i^2 (rounding of G~_i)^2
    input_squares: Float[Array, ""]  # sum_i (rounding of u_i)^2 G~_i^2


def zero(problem: LoRAProblem) -> dict[str, Sums]:
    """The empty sums of both arrays."""
    adapter = problem.adapters["query"]
    nothing = jnp.zeros((), problem.dtype)
    lengths = {"a": adapter.a.shape[0], "b": adapter.b.shape[0]}
    out = {}
    for half, n in lengths.items():
        vector = jnp.zeros(n, problem.dtype)
        out[half] = Sums(vector, vector, nothing)
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
    problem, floors, sigma = grounds.problem, grounds.floors, grounds.columns.sigma
    adapter = problem.adapters["query"]
    assert visit.dq is not None
    unit = unit_roundoff(problem)
    # the last product, G~ A^T, and the product X_Q B
    d_g = unit * visit.dq.shape[0] ** 0.5 * frobenius(adapter.a) * column_norms(visit.dq)
    d_g = d_g / sigma["query.b"].min()
    d_u = unit * visit.x_in.shape[1] ** 0.5 * frobenius(adapter.b) * visit.rounded.length
    own = terms.rounded(at["query.a"], floors.columns["query.a"])
    # errors of K are independent, and so larger in K A^T than a common one would be
    mixed = terms.rounded(at["query.b"], floors.columns["query.b"])
    mixed = jnp.maximum(mixed, floors.mixing * own)
    half_a = (visit.u, visit.dq, 0.0, d_u, own)
    half_b = (visit.x_in.T, dot(adapter.a, visit.dq), d_g, 0.0, mixed)
    return {
        half: _add(grounds, sums[half], visit, rows, terms, f"query.{half}", at, *parts)
        for half, parts in (("a", half_a), ("b", half_b))
    }


def _add(grounds: Grounds, sums: Sums, visit, rows, terms, name, at, u, g, on_g, on_u, rounded):
    beta = grounds.frame.beta
    k = at[name]
    live = visit.live
    weight = live * rows.slack
    # the second index of G~ is shared like that of the columns: the largest |G~_ib| / sigma_b
    g = (jnp.abs(g) / grounds.columns.sigma[name][:, None]).max(0, keepdims=True)
    # eps'[q^o k], then the terms in eps, then a G~
    row = beta * (terms.cn * terms.z_prime * k.eta_prime + terms.second(k)) + terms.root1**2 * g
    squares = (weight * beta * rounded) ** 2 + live * ((grounds.setup.gamma * g) ** 2 + on_g**2)
    return added(
        sums,
        dot(jnp.abs(u), (weight * row)[0]),
        dot(u**2, squares[0]),
        (live * (on_u * g) ** 2).sum(),
    )


def finish(grounds: Grounds, half: str, sums: Sums) -> tuple[Array, Array]:
    """(truncation, sum of squares of rounding) of every entry, scale not applied."""
    sigma = grounds.columns.sigma[f"query.{half}"].max()
    return sums.truncation * sigma, (sums.squares + sums.input_squares) * sigma**2
