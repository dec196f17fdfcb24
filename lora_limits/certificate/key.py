"""The bound of the key adapter, whose gradient is beta sum_i (columns of X_K under p) Q_i^T.

    dA    k = X_K B,  x = Q             dB    k = X_K,  x = Q A^T

Keys are centred by construction, and so the derivative of f reaches them through P' at Q_i - nu and
through P at nu: two terms, of which the second has eta for eta'. In units of sigma the row's bound
is the same for both arrays: one column stands for every k.
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
    """Sums over queries, by the entries of Q and then of Q A^T; in units of sigma."""

    truncation: Float[Array, " n"]  # sum_i |x_i| (terms in eps') + |nu| (terms in eps)
    rounding: Float[Array, " n"]  # sum_i |x_i| (rounding of the row) + (rounding of x_i) |G_i|


def zero(problem: LoRAProblem) -> Sums:
    """The empty sums."""
    r, d = problem.adapters["key"].a.shape
    vector = jnp.zeros(d + r, problem.dtype)
    return Sums(vector, vector)


def shares(
    grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column], terms: Terms
) -> Shares:
    """What a block of queries adds to the error of both arrays."""
    frame, sigma = grounds.frame, grounds.columns.sigma
    a = grounds.problem.adapters["key"].a
    r, d = a.shape
    q, live, k = visit.q, visit.live, at["key"]
    assert q is not None
    x = jnp.abs(jnp.concatenate([q, dot(a, q)]))
    nu = jnp.abs(jnp.concatenate([frame.nu, dot(a, frame.nu)]))
    # dK comes from dy by to_y^T: entries of to_y^T x_i in absolute values, over beta
    through_y = column_lengths(frame.to_y).T / frame.beta * column_lengths(visit.x)
    size_a = jnp.abs(q) + through_y + jnp.abs(frame.nu)[:, None]
    size = jnp.concatenate([size_a, dot(jnp.abs(a), size_a)])
    # rounding of the query (and its centre), by entry
    one = jnp.ones(d, x.dtype)
    through_a = jnp.concatenate([one, jnp.broadcast_to(frobenius(a), (r,))])
    moved = through_a[:, None] * visit.rounded.query
    # terms of (*) that P and P' share, and a G~ bounded by what G itself can be
    whole = (terms.cn + rows.slack * terms.dc) * terms.fz * k.mean
    rest = terms.second(k) + terms.root1**2 * whole
    prime = live * (rest + terms.cn * terms.z_prime * k.eta_prime)
    plain = live * (rest + terms.cn * terms.z * k.eta)
    rounded = live * rows.slack * terms.rounded(k, grounds.floors.columns["key"])
    # a rounded query times the row itself
    of_query = 2 * live * visit.rounded.query * whole
    size_x = x + moved
    sums = Sums(
        truncation=dot(size_x, prime[0]) + nu * plain.sum(),
        rounding=dot(size, rounded[0]) + through_a * of_query.sum(),
    )

    def tops(z: Float[Array, "n m"]) -> Float[Array, "2 m"]:
        """The largest entry of every column, in dA and in dB."""
        return jnp.concatenate([z[:d].max(0, keepdims=True), z[d:].max(0, keepdims=True)])

    scales = jnp.stack([sigma["key.a"].max(), sigma["key.b"].max()])[:, None] * frame.beta
    truncation = tops(size_x) * prime + tops(nu[:, None]) * plain
    rounding = tops(size) * rounded + tops(through_a[:, None]) * of_query
    return Shares(sums, scales * truncation, scales * rounding)


def finish(grounds: Grounds, sums: Sums) -> dict[str, tuple[Array, Array]]:
    """{half: (truncation, rounding)} of every entry, (1, m): columns alike; scale not applied."""
    d = grounds.frame.nu.shape[0]
    out = {}
    for half, part in (("a", slice(None, d)), ("b", slice(d, None))):
        sigma = grounds.frame.beta * grounds.columns.sigma[f"key.{half}"].max()
        out[half] = (sigma * sums.truncation[None, part], sigma * sums.rounding[None, part])
    return out
