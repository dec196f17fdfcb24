"""Which degree is enough: the polynomial gradient of every degree at once, densely.

Dense on purpose: one compilation serves all degrees, and the tests hold the fast route against it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import lora_limits as ll
from experiments.problems import smollm2
from lora_limits.coordinates import frame as frames
from lora_limits.instruments.compiling import quick_jit
from lora_limits.linalg import dot
from lora_limits.polynomial import series
from lora_limits.problem import project, pull_back

HIGHEST = 24


def series_gradient(
    problem: ll.LoRAProblem, c: jax.Array
) -> tuple[dict[str, ll.Adapter], jax.Array]:
    """(gradients, smallest row sum / sum of weights) with exp replaced by P(s) = sum_n c_n s^n,
    from L x L matrices.

    The same quantity as `gradient(problem, Polynomial(g))`: P in the normaliser, P' in the
    gradient, centred. A decoder's head is centred as if every query saw every key, which leaves its
    softmax as it is too; sums are over the keys that a query sees.
    O(Lq Lk (d + degree)) time, O(Lq Lk) memory.
    """
    decoder = problem.causal
    met = smollm2.as_they_meet(problem) if decoder else problem
    frame = frames.of_problem(met)
    beta = frame.beta
    q = frame.centred_queries(met, met.x_query)
    k = frame.centred_keys(met, met.x_key)
    w = jnp.exp(frame.log_weights(k))[None]
    weight = frame.total
    if decoder:
        w = jnp.tril(jnp.broadcast_to(w, (q.shape[0], k.shape[0])))
        weight = w.sum(1, keepdims=True)
    v = project(problem, "value", problem.x_value) - frame.v_mean[None]
    s = beta * dot(q, k.T)
    weighted = w * series.evaluate(c, s)
    total = weighted.sum(1, keepdims=True)
    f = weighted / total
    mean = dot(f, v)
    residual = mean + frame.v_mean[None] - problem.target
    kernel = dot(residual, v.T) - (residual * mean).sum(1, keepdims=True)
    prime = w * series.evaluate(series.derivative(c), s) / total * kernel
    rows = {
        "query": beta * dot(prime, k),
        "key": beta * (dot(prime.T, q) + (f * kernel).sum(0)[:, None] * frame.nu[None]),
        "value": dot(f.T, residual),
    }
    if "key" in problem.adapters and not decoder:
        # sum_j dl/dK_j = 0 exactly; the fast route imposes it by centring X_K.
        rows["key"] = rows["key"] - (w / frame.total).T * rows["key"].sum(0, keepdims=True)
    gradient = {n: pull_back(problem, n, rows[n]) for n in problem.adapters}
    return gradient, (total / weight).min()


def errors_by_degree(
    problem: ll.LoRAProblem, degrees: range, exact: Any, enough: float = 0.0
) -> list[dict[str, float]]:
    """Errors of Taylor's gradient for each degree: max norm relative to the largest entry, and
    worst Frobenius.

    Stops after two degrees in a row whose max-norm error is at most `enough`.
    """
    run = (quick_jit if problem.x_query.shape[0] <= 1024 else jax.jit)(series_gradient)
    top = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact))
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(exact)]
    out = []
    for g in degrees:
        # The coefficients of every degree in an array of one length: one program for all.
        c = jnp.zeros(HIGHEST + 1, problem.dtype).at[: g + 1].set(series.taylor(g, problem.dtype))
        got, normaliser = run(problem, c)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
        gaps = [jnp.abs(a - b) for a, b in pairs]
        most = max(float(x.max()) for x in gaps)
        relative = [
            float(jnp.linalg.norm(x)) / max(n, 1e-300) for x, n in zip(gaps, norms, strict=True)
        ]
        row = {
            "degree": g,
            "max_error": most / max(top, 1e-300),
            "frobenius_error": max(relative),
            "normaliser": float(normaliser),
        }
        out.append(row)
        if len(out) > 1 and max(out[-1]["max_error"], out[-2]["max_error"]) <= enough:
            break
    return out


def first_below(rows: list[dict[str, float]], name: str, tolerance: float) -> int | None:
    """The smallest degree from which the error stays at or below the tolerance, or None."""
    best = None
    for row in reversed(rows):
        if not row[name] <= tolerance:
            break
        best = int(row["degree"])
    return best
