"""From a tolerance to the cheapest method that certifies it, by a cost model and the certificate
itself.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from lora_limits.gradients.solve import Exact, Method, Polynomial, gradient
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem, check_static, check_values, inputs

ROWS = 48  # sampled queries behind the first guess
TILE = 1024
DENSE = 2**20  # scores that may be held at once
# Operations beside the products, measured once against their time on a CPU: per score (two
# exponentials and the
# passes over a tile), per token and feature in each sweep (building, differentiating), and per
# token (mostly the certificate, whose cost hardly depends on k).
PER_SCORE, PER_FEATURE, PER_TOKEN = 45.0, 36.0, 26_000.0

_gradient = jax.jit(gradient, static_argnames="method")


def exact_operations(problem: LoRAProblem) -> float:
    """Modelled operations of the tiled exact gradient: two score products, two for values, one per
    adapted side.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    names = problem.adapters
    columns = 2 * d + dv + ("query" in names) * d + ("key" in names) * d + ("value" in names) * dv
    columns += dv if "query" in names or "key" in names else 0
    return problem.x_query.shape[0] * problem.x_key.shape[0] * (2.0 * columns + PER_SCORE)


def polynomial_operations(problem: LoRAProblem, degree: int) -> float:
    """Modelled operations of the polynomial gradient and its certificate, k = binom(d + g, g)
    features.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    names = problem.adapters
    lq = problem.x_query.shape[0]
    lk = problem.x_key.shape[0]
    r = names["value"].a.shape[0] if "value" in names else 0
    on_queries = (1 + dv + r) + ("query" in names) * (1 + dv) + ("key" in names) * (1 + dv) + r
    on_keys = (1 + dv + r) + ("key" in names) * (1 + dv) + r
    sweeps = 2 if "key" in names or "value" in names else 1
    per_feature = lq * (2.0 * on_queries + PER_FEATURE) + lk * (
        2.0 * on_keys + sweeps * PER_FEATURE
    )
    return monomials.count(d, degree) * per_feature + (lq + lk) * PER_TOKEN


def exact_method(problem: LoRAProblem) -> Exact:
    """The exact method to fall back on: dense while the scores fit a small buffer, else tiled."""
    pairs = problem.x_query.shape[0] * problem.x_key.shape[0]
    return Exact() if pairs <= DENSE else Exact(block_size=TILE)


def affordable(problem: LoRAProblem) -> int:
    """The largest degree whose modelled cost stays below the exact one's, or 0."""
    limit = exact_operations(problem)
    degree = 0
    while polynomial_operations(problem, degree + 1) < limit and degree < 40:
        degree += 1
    return degree


def _host(problem: LoRAProblem):
    """Q, K, V, adapters' columns and scalars in float64 on the host."""
    x = {n: np.asarray(v, np.float64) for n, v in inputs(problem).items()}
    scale = float(problem.scale)
    beta = float(problem.beta)
    rows = {}
    for n in ("query", "key", "value"):
        rows[n] = x[n] @ np.asarray(getattr(problem.weights, n), np.float64)
        if n in problem.adapters:
            adapter = problem.adapters[n]
            rows[n] += (
                scale
                * (x[n] @ np.asarray(adapter.b, np.float64))
                @ np.asarray(adapter.a, np.float64)
            )
    return x, rows, scale, beta


def guess(problem: LoRAProblem, tolerance: float, most: int) -> int:
    """The degree at which the certificate should first reach the tolerance, from exact scores of a
    few queries.

    For every degree up to `most`, the leading term of the certificate, sum_i |u_i| |c_i|
    sqrt(eta'[v^2] eta'[k^2]), is computed from the true remainders on ROWS sampled queries and
    scaled to all; most + 1 where none is small enough. Only a guess: `choose` accepts nothing but
    the certificate. O(ROWS Lk (d + most)) on the host.
    """
    x, rows, scale, beta = _host(problem)
    pick = np.unique(np.linspace(0, x["query"].shape[0] - 1, ROWS).astype(int))
    nu = rows["query"].mean(0)
    q = rows["query"][pick]
    log_w = beta * rows["key"] @ nu
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    k = rows["key"] - w @ rows["key"]
    s = beta * (q - nu) @ k.T
    f = w * np.exp(s - s.max(1, keepdims=True))
    f /= f.sum(1, keepdims=True)
    v = rows["value"]
    c = f @ v - np.asarray(problem.target, np.float64)[pick]
    spread_v = ((v - w @ v) ** 2).sum(1)
    scale_rows = abs(scale) * x["query"].shape[0] / len(pick)
    weights = []  # one (row weights, column) pair per gradient array
    for name, adapter in problem.adapters.items():
        a = np.asarray(adapter.a, np.float64)
        b = np.asarray(adapter.b, np.float64)
        xk = x["key"] - w @ x["key"]
        if name == "query":
            pairs = (
                (np.abs(x["query"][pick] @ b), beta * k),
                (np.abs(x["query"][pick]), beta * k @ a.T),
            )
        elif name == "key":
            pairs = ((np.abs(q - nu), beta * xk @ b), (np.abs((q - nu) @ a.T), beta * xk))
        else:
            xv = x["value"] - w @ x["value"]
            pairs = ((np.ones((len(pick), 1)), xv @ b), (np.ones((len(pick), 1)), xv))
        weights += [(name, u.max(1), (column**2).max(1)) for u, column in pairs]
    length = np.sqrt((c**2).sum(1))
    p = np.zeros_like(s)
    term = np.ones_like(s)
    exp = np.exp(s)
    width = math.sqrt(v.shape[1])
    for degree in range(most + 1):
        lower, p = p, p + term  # P_{g-1}, P_g
        term = term * s / (degree + 1)
        worst = 0.0
        for name, u, column in weights:
            total = np.maximum((w * p).sum(1, keepdims=True), 1e-300)
            left = w * np.abs(exp - (p if name == "value" else lower)) / total
            e = length / width * np.sqrt((left @ spread_v) * (left @ column))
            worst = max(worst, scale_rows * float((u * e).sum()) * 2)
        if worst <= tolerance:
            return degree
    return most + 1


def _certified(problem: LoRAProblem, method: Polynomial, tolerance: float) -> bool:
    bound = _gradient(problem, method=method).bound
    return all(float(b) <= tolerance for b in jax.tree.leaves(bound))


def choose(problem: LoRAProblem, tolerance: float) -> Method:
    """The cheapest method whose certificate puts every gradient array within `tolerance` in max
    norm; else Exact.

    The cost model gives the largest degree that beats the exact gradient; sampled rows give a first
    guess of the degree needed; the certificate of a real run decides, degree by degree upwards, and
    once downwards. Taylor only: its certificate is the tightest. Concrete problems only (not under
    jit). Costs a few polynomial gradients. Raises ValueError for a tolerance that is not a positive
    number.
    """
    if not (isinstance(tolerance, int | float | np.floating) and 0 < float(tolerance) < math.inf):
        raise ValueError(f"tolerance: got {tolerance!r}, expected a number above 0")
    check_static(problem)
    check_values(problem)
    most = affordable(problem)
    degree = guess(problem, float(tolerance), most)
    if degree > most + 1:
        return exact_method(problem)
    degree = min(degree, most)
    if _certified(problem, Polynomial(degree), tolerance):
        while degree > 0 and _certified(problem, Polynomial(degree - 1), tolerance):
            degree -= 1
        return Polynomial(degree)
    for higher in range(degree + 1, min(degree + 2, most) + 1):
        if _certified(problem, Polynomial(higher), tolerance):
            return Polynomial(higher)
    return exact_method(problem)
