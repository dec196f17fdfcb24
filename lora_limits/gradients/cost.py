"""What a gradient costs, in operations: a model, measured once against times on a CPU."""

from __future__ import annotations

from lora_limits.gradients.methods import Exact
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem

TILE = 1024
DENSE = 2**20  # scores that may be held at once
# Operations beside the products: per score (two exponentials and the passes over a tile), per token
# and feature in each sweep (building, differentiating), and per token (mostly the certificate, whose
# cost hardly depends on k).
PER_SCORE, PER_FEATURE, PER_TOKEN = 45.0, 36.0, 26_000.0


def exact_operations(problem: LoRAProblem) -> float:
    """Modelled operations of the tiled exact gradient.

    Two score products, two for values, and one for each adapted side. Half of it in a causal order.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    names = problem.adapters
    columns = 2 * d + dv + ("query" in names) * d + ("key" in names) * d + ("value" in names) * dv
    columns += dv if "query" in names or "key" in names else 0
    pairs = problem.x_query.shape[0] * problem.x_key.shape[0] / (2 if problem.causal else 1)
    return pairs * (2.0 * columns + PER_SCORE)


def polynomial_operations(problem: LoRAProblem, degree: int) -> float:
    """Modelled operations of the polynomial gradient and its certificate, k = binom(d + g, g)."""
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    names = problem.adapters
    lq = problem.x_query.shape[0]
    lk = problem.x_key.shape[0]
    r = names["value"].a.shape[0] if "value" in names else 0
    on_queries = (1 + dv + r) + ("query" in names) * (1 + dv) + ("key" in names) * (1 + dv) + r
    on_keys = (1 + dv + r) + ("key" in names) * (1 + dv) + r
    sweeps = 2 if "key" in names or "value" in names else 1
    per_feature = lq * (2.0 * on_queries + PER_FEATURE)
    per_feature += lk * (2.0 * on_keys + sweeps * PER_FEATURE)
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
