"""How cost grows: operations counted against L, widths against Gamma to L = 2^64, and what the LoRA
rank costs.

Panels of points:

operations   read off the jaxpr (Theorem F.1): Lemma 3.1 as written, the dense gradient, the chain, the fast gradient
counted      d = log2 L, R = Gamma^2 = kappa^2 ln L, tolerance 1/L: g from Chebyshev's remainder, k = binom(d + g, g)
measured     the same where it runs: the smallest g and the smallest rank of f whose gradients are within 1/L
rank         operations and errors of the fast gradient and of the exact one against r
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.runner.config import Fields
from lora_limits.gradients import exact
from lora_limits.instruments.comparing import max_error
from lora_limits.instruments.counting import count_operations
from lora_limits.polynomial import needed

VERSION = 1
X64 = True
POINTS = ("lengths", "kappas", "counted", "measured_kappas", "measured", "ranks")
ALGORITHMS = ("literal", "dense", "chain", "fast")


class Config(Fields):
    """lengths: log2 L of the operation counts, at `width` and `degree`. kappas: Gamma / sqrt(ln L).

    counted, measured: log2 L. ranks, at rank_length tokens, rank_width and rank_degree.
    """

    lengths: tuple[PositiveInt, ...]
    width: PositiveInt
    degree: PositiveInt
    kappas: tuple[PositiveFloat, ...]
    counted: tuple[PositiveInt, ...]
    measured_kappas: tuple[PositiveFloat, ...]
    measured: tuple[PositiveInt, ...]
    ranks: tuple[PositiveInt, ...]
    rank_length: PositiveInt
    rank_width: PositiveInt
    rank_degree: PositiveInt
    seed: int = Field(default=0, ge=0)


def points(config: Config) -> list[dict[str, Any]]:
    """The four panels, one after another."""
    counts = [
        {"panel": "operations", "algorithm": a, "power": n}
        for a in ALGORITHMS
        for n in config.lengths
    ]
    counted = [
        {"panel": "counted", "kappa": kappa, "power": n}
        for kappa in config.kappas
        for n in config.counted
    ]
    runs = [
        {"panel": "measured", "kappa": kappa, "power": n}
        for kappa in config.measured_kappas
        for n in config.measured
    ]
    return counts + counted + runs + [{"panel": "rank", "rank": rank} for rank in config.ranks]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """flops; or degree and exponent log k / log L; or those measured, and eps-rank; or costs and
    error at a rank.
    """
    panels: dict[str, Callable[..., dict[str, Any]]] = {
        "operations": _operations,
        "counted": _counted,
        "measured": _measured,
        "rank": _rank,
    }
    return panels[point["panel"]](point, config)


@functools.cache
def _problem(length: int, width: int, rank: int) -> Callable[..., Any]:
    """(key, gamma=) -> a random problem of one shape, compiled once."""
    return jax.jit(functools.partial(ll.random_problem, length=length, width=width, rank=rank))


def _abstract(length: int, width: int, rank: int) -> Any:
    """A problem without numbers: counting needs shapes alone."""
    shape = {"length": length, "width": width, "rank": rank, "adapt": ("query", "value")}
    return jax.eval_shape(lambda key: ll.random_problem(key, **shape, gamma=1.0), jax.random.key(0))


def _literal(problem: Any) -> Any:
    """Lemma 3.1 as written: an L x L matrix diag f_j - f_j f_j^T and an L x d^2 block C_j for every
    token j.
    """
    t = exact.dense_terms(problem)

    def token(x: Any, f: Any, q: Any) -> Any:
        # C_j is (L, d^2): the Kronecker row of token j's input with every key.
        block = (x[None, :, None] * t["K"][:, None, :]).reshape(f.shape[0], -1)
        return jnp.matmul(jnp.matmul(block.T, jnp.diag(f) - f[:, None] * f[None, :]), q)

    return jax.vmap(token)(problem.x_query, t["f"], t["q"]).sum(0)


def _operations(point: dict[str, Any], config: Config) -> dict[str, Any]:
    # One degree more for the fast gradient, whose kernel is made of P', a degree lower.
    functions = {
        "literal": _literal,
        "dense": exact.dense_gradient,
        "chain": lambda p: ll.gradient(p, ll.Chain(config.degree)).gradient,
        "fast": lambda p: ll.gradient(p, ll.Polynomial(config.degree + 1)).gradient,
    }
    # Lengths that would never run are counted all the same.
    problem = _abstract(2 ** point["power"], config.width, 2)
    return count_operations(functions[point["algorithm"]], problem)


def _counted(point: dict[str, Any], config: Config) -> dict[str, Any]:
    power = point["power"]
    log_length = point["power"] * math.log(2)
    # Chebyshev's remainder on [-R, R] with R = kappa^2 ln L, at tolerance 1/L.
    degree = needed.degree_needed(point["kappa"] ** 2 * log_length, 2.0**-power)
    exponent = needed.width_exponent(power, degree, log_length)
    limit = needed.limit_exponent(point["kappa"] ** 2)
    return {"degree": degree, "exponent": exponent, "limit": limit}


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest integer in (low, high] at which a monotone condition holds, or None."""
    if not holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _measured(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Every factor is evaluated densely, entry by entry, so degrees can be tried whose features
    would not fit.
    """
    power = point["power"]
    length = 2 ** point["power"]
    gamma = point["kappa"] * math.sqrt(math.log(length))
    problem = _problem(length, power, 4)(jax.random.key(config.seed), gamma=gamma)
    t = {name: np.asarray(x) for name, x in exact.dense_terms(problem).items()}
    # The coordinates of the fast gradient: queries about their mean, keys about their weighted
    # mean. f is what it was, and its scores reach less far.
    q = t["Q"] - t["Q"].mean(0)
    k = t["K"]
    w = np.exp(k @ t["Q"].mean(0) / power)
    k = k - w @ k / w.sum()
    s = q @ k.T / power
    radius = float(np.abs(s).max())
    error = _gradient_error(problem, t)

    def polynomial(degree: int) -> bool:
        # Interpolated far beyond the degree and cut there: the series itself, not its interpolant.
        long = np.polynomial.Chebyshev.interpolate(lambda x: np.exp(radius * x), degree + 40)
        series = long.truncate(degree + 1)
        return error(w * series(s / radius)) <= 1 / length

    u, sigma, vt = np.linalg.svd(t["f"])
    # One by one: odd and even degrees need not fall in line
    degree = next((g for g in range(41) if polynomial(g)), None)
    # The error falls with the rank, so that halving finds the first that is enough.
    rank = _smallest(lambda k: error((u[:, :k] * sigma[:k]) @ vt[:k]) <= 1 / length, 0, length)
    exponent = None if degree is None else needed.width_exponent(power, degree, math.log(length))
    return {"degree": degree, "exponent": exponent, "eps_rank": rank, "score_bound": radius}


def _gradient_error(problem: Any, t: dict[str, Any]) -> Callable[[Any], float]:
    """f~ (rows of any sum) -> largest max-norm error of the four arrays relative to the largest
    entry of each.
    """

    def rows(f: Any) -> tuple[Any, Any]:
        f = f / f.sum(1, keepdims=True)
        out = f @ t["V"]
        c = out - np.asarray(problem.target)
        p = f * (c @ t["V"].T - (c * out).sum(1, keepdims=True))
        return p @ t["K"], f.T @ c

    def arrays(f: Any) -> list[Any]:
        pulled = []
        for name, dh in zip(("query", "value"), rows(f), strict=True):
            x = np.asarray(getattr(problem, f"x_{name}"))
            a = np.asarray(problem.adapters[name].a)
            b = np.asarray(problem.adapters[name].b)
            pulled += [(x @ b).T @ dh, x.T @ (dh @ a.T)]
        return pulled

    want = arrays(t["f"])
    return lambda f: max(max_error(x, y) for x, y in zip(arrays(f), want, strict=True))


def _rank(point: dict[str, Any], config: Config) -> dict[str, Any]:
    shape = {"width": config.rank_width, "rank": point["rank"]}
    problem = _problem(config.rank_length, **shape)(jax.random.key(config.seed), gamma=1.0)
    want = jax.jit(exact.dense_gradient)(problem)[1]
    got = jax.jit(lambda p: ll.gradient(p, ll.Chain(config.rank_degree)).gradient)(problem)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    long = _abstract(2**14, **shape)
    method = ll.Polynomial(config.rank_degree + 1)
    fast = count_operations(lambda p: ll.gradient(p, method).gradient, long)
    dense = count_operations(exact.dense_gradient, long)
    error = max(max_error(x, y) for x, y in pairs)
    return {"error": error, "fast": fast["flops"], "dense": dense["flops"]}
