"""The bound of the query adapter: G - G~ = ((*) - a G~) / (1 + a), row by row, times |u_i|.

dA    u = X_Q B,  k = K             dB    u = X_Q,  k = K A^T
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import frobenius, gamma
from lora_limits.certificate.row_bounds import Column, Rows
from lora_limits.certificate.terms import Grounds, Shares, Terms, Visit
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem


class Sums(NamedTuple):
    """Sums over queries for one array, whose first index is that of u; all in units of sigma."""

    truncation: Float[Array, " n"]  # sum_i |u_i| |G - G~|_i
    rounding: Float[Array, " n"]  # sum_i |u_i| (rounding of G~_i and of its sum over queries)
    of_inputs: Float[Array, ""]  # sum_i (rounding of u_i) |G~_i|


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


def shares(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], terms: Terms
) -> dict[str, Shares]:
    """What a block of queries adds to the error of both arrays."""
    problem, floors, sigma = grounds.problem, grounds.floors, grounds.columns.sigma
    adapter = problem.adapters["query"]
    assert visit.dq is not None
    # the product X_Q B
    d_u = gamma(problem, visit.x_in.shape[1] + 4) * frobenius(adapter.b) * visit.rounded.length
    own = terms.rounded(at["query.a"], floors.columns["query.a"], floors.from_x)
    # the sums behind dQ A^T are those of dQ: their rounding is read from its column
    mixed = terms.rounded(at["query.b"], floors.columns["query.b"])
    mixed = mixed + floors.from_x_a * terms.summed * at["query.a"].size
    # the second index of G~ is shared like that of the columns: the largest |G~_ib| / sigma_b
    g_a = (jnp.abs(visit.dq) / sigma["query.a"][:, None]).max(0, keepdims=True)
    g_b = (jnp.abs(dot(adapter.a, visit.dq)) / sigma["query.b"][:, None]).max(0, keepdims=True)
    # the products with to_x and A, and the sum over queries, which dA has before to_x
    after_a = 2 * grounds.setup.gamma * floors.from_x * g_a
    after_b = 2 * grounds.setup.gamma * (floors.from_x_a * g_a + g_b)
    half_a = (visit.u, g_a, after_a, d_u, own)
    half_b = (visit.x_in.T, g_b, after_b, jnp.zeros_like(d_u), mixed)
    return {
        half: _shares(grounds, visit, rows, terms, f"query.{half}", at, *parts)
        for half, parts in (("a", half_a), ("b", half_b))
    }


def _shares(grounds, visit, rows, terms, name, at, u, g, after, on_u, rounded) -> Shares:
    beta = grounds.frame.beta
    k = at[name]
    live = visit.live
    weight = live * rows.slack
    # eps'[q^o k], then the terms in eps, then a G~
    row = beta * (terms.cn * terms.z_prime * k.eta_prime + terms.second(k))
    row = weight * (row + terms.root1**2 * (g + after))
    # rounding of the row, of what comes after it, of u
    lost = weight * beta * rounded + live * after
    of_input = live * on_u * g
    size = jnp.abs(u) + on_u
    sums = Sums(dot(size, row[0]), dot(size, lost[0]), of_input.sum())
    top = size.max(0, keepdims=True)
    sigma = grounds.columns.sigma[name].max()
    return Shares(sums, sigma * top * row, sigma * (top * lost + of_input))


def finish(grounds: Grounds, half: str, sums: Sums) -> tuple[Array, Array]:
    """(truncation, rounding) of every entry, (n, 1): rows alike throughout; scale not applied."""
    sigma = grounds.columns.sigma[f"query.{half}"].max()
    rounding = sums.rounding + sums.of_inputs
    return sums.truncation[:, None] * sigma, rounding[:, None] * sigma
