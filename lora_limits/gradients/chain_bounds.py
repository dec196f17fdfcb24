"""Lemmas 3.3 to 3.7 with constants: what every term of the chain may err by, and what it does.

With delta_i = sum_j |f~_ij - f_ij| (computed densely here: this is an experiment), hr half the
range of a column, h_k = hr(V_k), H = sum_k h_k^2, hq_i = sum_k |c~_ik| h_k and
F_i = min(1, max_j |f~_ij| + delta_i / 2) >= max_j f_ij:

    3.4   |dc_ik| <= delta_i h_k         (|df_ij| <= delta_i / 2, as both rows sum to 1)
    3.5   |dq_ij| <= delta_i max_j sum_k h_k |V_jk| =: Q_i
    3.6   |dp1_ij| <= (delta_i / 2) max_j |q~_ij| + F_i Q_i      [p1~ - p1 = df o q~ + f o dq]
    3.7   |drho_i| <= delta_i (hq_i + sum_k h_k (|(f~ V)_ik| + delta_i h_k)) =: r_i
          |dp2_ij| <= r_i max_j |f~_ij| + (|rho~_i| + r_i) delta_i / 2
    p     |dp_ij| <= (delta_i / 2)(2 + delta_i) hq_i + F_i delta_i (2 H + hq_i)
          sum_j |dp_ij| <= E_i = delta_i ((3 + delta_i) hq_i + 2 H)
    dA_Q  |.|_ab <= s beta hr(K_b) sum_i |(X_Q B)_ia| E_i        dB_Q: K A^T for K, X_Q for X_Q B
    dA_K  |.|_ab <= s beta hr((X_K B)_a) sum_i |Q_ib| E_i        dB_K: X_K for X_K B, Q A^T for Q
    dA_V  |.|_ab <= s sum_i d_ia |c~_ib| + (|(f~ X_V B)_ia| + d_ia) delta_i h_b
          with d_ia = delta_i hr((X_V B)_a)                      dB_V: X_V for X_V B, V A^T for V

Rounding is not included.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.gradients import exact
from lora_limits.gradients.chain import ChainTerms, chain_terms, gradient_of_terms
from lora_limits.linalg import dot
from lora_limits.problem import NAMES, LoRAProblem, inputs, projections, scalars
from lora_limits.problem_checks import refuse_structure


def _half_range(x: Float[Array, "n d"]) -> Float[Array, " d"]:
    return (x.max(0) - x.min(0)) / 2


def _row_bounds(
    problem: LoRAProblem, t: ChainTerms, f: Float[Array, "lq lk"], delta: Float[Array, " lq"]
) -> dict[str, Array]:
    """Bounds on each term, (Lq,) or (Lq, d_value), from delta and computed quantities.

    "row": of a row of p, in l1.
    """
    v = t.v2
    h = _half_range(v)[None]
    hq = (jnp.abs(t.c) * h).sum(1)
    total = (h**2).sum()
    out = jnp.abs(t.c + problem.target)
    top = jnp.abs(f).max(1)
    dq = delta * (jnp.abs(v) * h).sum(1).max()
    drho = delta * (hq + (h * (out + delta[:, None] * h)).sum(1))
    peak = jnp.minimum(top + delta / 2, 1)
    return {
        "f": delta / 2,
        "c": delta[:, None] * h,
        "q": dq,
        "p1": delta / 2 * jnp.abs(dot(t.u2, v.T)).max(1) + peak * dq,
        "p2": drho * top + (jnp.abs(t.rho) + drho) * delta / 2,
        "p": delta / 2 * (2 + delta) * hq + peak * delta * (2 * total + hq),
        "row": delta * ((3 + delta) * hq + 2 * total),
    }


class _Sides(NamedTuple):
    """The columns that meet p on the left and on the right in one array."""

    left: Array
    right: Array
    residual: Array  # c~ as the right side of a value array has it


def _sides(problem: LoRAProblem, t: ChainTerms, name: str) -> dict[str, _Sides]:
    q, k, v = projections(problem)
    adapter = problem.adapters[name]
    x = inputs(problem)[name]
    y = {"query": k, "key": q, "value": v}[name]
    return {
        "a": _Sides(dot(x, adapter.b), y, t.c),
        "b": _Sides(x, dot(y, adapter.a.T), dot(t.c, adapter.a.T) if name == "value" else t.c),
    }


def _array_bound(problem: LoRAProblem, t: ChainTerms, name: str, sides: _Sides, delta, row):
    """A bound on every entry of dA or dB; see `chain_errors`."""
    scale, beta = scalars(problem)
    left, right, c = sides
    if name == "query":
        size = dot(jnp.abs(left).T, row[:, None])
        return jnp.abs(scale) * beta * size * _half_range(right)[None]
    if name == "key":
        size = dot(row[None], jnp.abs(right))
        return jnp.abs(scale) * beta * _half_range(left)[:, None] * size
    dz = delta[:, None] * _half_range(left)[None]
    z = jnp.abs(dot(t.u1, dot(t.v1.T, left))) + dz
    of_mean = dot(dz.T, jnp.abs(c))
    of_residual = dot(z.T, delta[:, None] * _half_range(right)[None])
    return jnp.abs(scale) * (of_mean + of_residual)


def chain_errors(
    problem: LoRAProblem, u1: Float[Array, "lq k1"], v1: Float[Array, "lk k1"]
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """{term: (max-norm error, bound)} for f, c, q, p1, p2, p and "query.a", "query.b", ...

    O(Lq Lk (k1 + d)) time, O(Lq Lk + L k1 d_value) memory.
    """
    refuse_structure(problem, "chain_errors")
    t = chain_terms(problem, u1, v1)
    true = exact.dense_terms(problem)
    f = dot(t.u1, t.v1.T)
    p1 = dot(t.u3, t.v3.T)
    p2 = dot(t.u4, t.v4.T)
    got = {"f": f, "c": t.c, "q": dot(t.u2, t.v2.T), "p1": p1, "p2": p2, "p": p1 - p2}
    delta = jnp.abs(f - true["f"]).sum(1)
    bounds = _row_bounds(problem, t, f, delta)
    out = {name: (jnp.abs(x - true[name]).max(), bounds[name].max()) for name, x in got.items()}
    arrays = gradient_of_terms(problem, t)
    right = exact.dense_gradient(problem)[1]
    for name in (n for n in NAMES if n in arrays):
        for half, sides in _sides(problem, t, name).items():
            limit = _array_bound(problem, t, name, sides, delta, bounds["row"])
            error = jnp.abs(getattr(arrays[name], half) - getattr(right[name], half))
            out[f"{name}.{half}"] = (error.max(), limit.max())
    return out
