"""The share of one query in the error of an approximate gradient, where not every query sees every
key or rotations stand between the projections and the scores.

As in rows.py, for tokens that lie in memory as rows: f ~ w e^s over the keys that the query sees,
f~ and f' of whatever stands for e^s in the factor and in its kernel. A query's share in the key
adapter is

    sum_j x_j (x) R_j^T (d'_j (Q_i - nu) + d_j nu),   d' = p - p' less its sum in shares,  d = p - p~

which with rotations is no outer product, nor a few: every key turns the query by its own angle. So
the shares of a query's row in dQ, dK and dV are written out and pulled back as a gradient is,
O(L r (d + d_model)) an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, pull_back, replaced, scalars
from lora_limits.rotary import Rotations


class Head(NamedTuple):
    """All tokens of a settled problem as rows, sqrt(beta) in queries and keys, all centred."""

    q: Float[Array, "lq d"]
    k: Float[Array, "lk d"]
    v: Float[Array, "lk dv"]
    v_mean: Float[Array, " dv"]
    nu: Float[Array, " d"]
    w: Float[Array, " lk"]  # weights
    asked: Bool[Array, " lq"]


# (scores of a query with all keys, which of them it sees, the query) -> what stands for w e^s in the
# factor and in its kernel, both times any common number
Kernel = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# a query -> which keys it sees
Sees = Callable[[jax.Array], jax.Array]


class _Row(NamedTuple):
    """A row of f or of what stands for it: outputs, residual, and p with either kernel."""

    f: Float[Array, " lk"]
    c: Float[Array, " dv"]
    p: Float[Array, " lk"]
    p_kernel: Float[Array, " lk"]


def _row(head: Head, e: jax.Array, kernel: jax.Array, target: jax.Array, counts: jax.Array) -> _Row:
    """From the row's values before they are normalised; 0 for a query that sees nothing."""
    total = e.sum()
    safe = jnp.where(total != 0, total, 1)
    f = e / safe
    out = dot(f, head.v)
    # what is centred away comes back where there is something to see
    c = out - target + jnp.where(total != 0, head.v_mean, 0)
    c = jnp.where(counts, c, 0)
    centred = jnp.where(total != 0, dot(head.v, c) - (c * out).sum(), 0)
    return _Row(f, c, f * centred, kernel / safe * centred)


def row_errors(
    problem: LoRAProblem, head: Head, sees: Sees, kernel: Kernel, index: Int[Array, " m"]
) -> dict[str, Adapter]:
    """The shares E_i of the queries `index` in the error: {name: Adapter of (m, ...) arrays}.

    O(m L (d + d_value + r (d + d_model))) time, O(L (d + d_value) + m r (d + d_model)) memory.
    """
    root = jnp.sqrt(scalars(problem)[1])
    shares = head.w / jnp.maximum(head.w.sum(), 1)
    log_w = jnp.log(jnp.where(head.w > 0, head.w, 1))

    def one(i: jax.Array) -> dict[str, Adapter]:
        q, target = head.q[i], problem.target[i]
        s = dot(head.k, q)
        seen = sees(i) & (head.w > 0)
        least = float(jnp.finfo(s.dtype).min)
        log_e = jnp.where(seen, s + log_w, least)
        e = jnp.where(seen, jnp.exp(log_e - log_e.max()), 0)
        exact = _row(head, e, e, target, head.asked[i])
        plain, prime = (jnp.where(seen, z, 0) for z in kernel(s, seen, i))
        got = _row(head, plain, prime, target, head.asked[i])
        of_kernel = exact.p - got.p_kernel
        held = of_kernel - shares * of_kernel.sum()
        of_weights = exact.p - got.p
        rows = {
            "query": lambda: root * dot(of_kernel, head.k)[None],
            "key": lambda: root * (jnp.outer(held, q) + jnp.outer(of_weights, head.nu)),
            "value": lambda: jnp.outer(exact.f, exact.c) - jnp.outer(got.f, got.c),
        }
        alone = _with_query(problem, i)
        return {name: pull_back(alone, name, rows[name]()) for name in problem.adapters}

    return jax.lax.map(one, index)


def _with_query(problem: LoRAProblem, i: jax.Array) -> LoRAProblem:
    """The problem with one query, for `pull_back` of its row alone."""
    rotations = problem.rotations
    if rotations is not None:
        rotations = Rotations(rotations.query[i][None], rotations.key)
    return replaced(problem, x_query=problem.x_query[i][None], rotations=rotations)
