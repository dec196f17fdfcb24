"""The bound of the query adapter: G - G~ = ((*) - a G~) / (1 + a), row by row, times |u_i|.

    dA    u = X_Q B,  k = K             dB    u = X_Q,  k = K A^T

In units of sigma the row's bound is the same for both arrays: one column stands for every k.
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
    """Sums over queries, by the entries of X_Q B and then of X_Q; all in units of sigma."""

    truncation: Float[Array, " n"]  # sum_i |u_i| |G - G~|_i
    rounding: Float[Array, " n"]  # sum_i |u_i| (rounding of G~_i and of its sum over queries)
    of_inputs: Float[Array, ""]  # sum_i (rounding of X_Q B) |G~_i|, of dA alone


def zero(problem: LoRAProblem) -> Sums:
    """The empty sums."""
    adapter = problem.adapters["query"]
    n = adapter.a.shape[0] + adapter.b.shape[0]
    vector = jnp.zeros(n, problem.dtype)
    return Sums(vector, vector, jnp.zeros((), problem.dtype))


def shares(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], terms: Terms
) -> Shares:
    """What a block of queries adds to the error of both arrays."""
    problem, floors, sigma = grounds.problem, grounds.floors, grounds.columns.sigma
    adapter = problem.adapters["query"]
    beta = grounds.frame.beta
    live = visit.live
    k = at["query"]
    assert visit.dq is not None
    # the second index of G~ is shared like that of the columns: the largest |G~_ib| / sigma_b
    g_a = jnp.abs(visit.dq) * (1 / sigma["query.a"])[:, None]
    g_b = jnp.abs(dot(adapter.a, visit.dq)) * (1 / sigma["query.b"])[:, None]
    g = jnp.concatenate([g_a, g_b]).max(0, keepdims=True)
    # the products with to_x and A, and the sum over queries, which dA has before to_x
    after = 2 * grounds.setup.gamma * floors.from_x * g
    # eps'[q^o k], then the terms in eps, then a G~
    row = beta * (terms.cn * terms.z_prime * k.eta_prime + terms.second(k))
    row = live * rows.slack * (row + terms.root1**2 * (g + after))
    # rounding of the row, and of what comes after it
    rounded = terms.rounded(k, floors.columns["query"], floors.from_x)
    lost = live * (rows.slack * beta * rounded + after)
    # the product X_Q B
    on_u = gamma(problem, visit.x_in.shape[1] + 4) * frobenius(adapter.b) * visit.rounded.length
    of_input = live * on_u * g
    u = jnp.abs(visit.u) + on_u
    x = jnp.abs(visit.x_in.T)
    size = jnp.concatenate([u, x])
    sums = Sums(dot(size, row[0]), dot(size, lost[0]), of_input.sum())
    # of each query, its largest entry in dA and in dB
    top = jnp.concatenate([u.max(0, keepdims=True), x.max(0, keepdims=True)])
    scales = jnp.stack([sigma["query.a"].max(), sigma["query.b"].max()])[:, None]
    no_input = jnp.zeros_like(of_input)
    rounding = top * lost + jnp.concatenate([of_input, no_input])
    return Shares(sums, scales * top * row, scales * rounding)


def finish(grounds: Grounds, sums: Sums) -> dict[str, tuple[Array, Array]]:
    """{half: (truncation, rounding)} of every entry, (n, 1): rows alike; scale not applied."""
    r = grounds.problem.adapters["query"].a.shape[0]
    rounding = sums.rounding.at[:r].add(sums.of_inputs)
    out = {}
    for half, part in (("a", slice(None, r)), ("b", slice(r, None))):
        sigma = grounds.columns.sigma[f"query.{half}"].max()
        out[half] = (sums.truncation[part, None] * sigma, rounding[part, None] * sigma)
    return out
