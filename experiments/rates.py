"""How cost grows: operations counted against L, widths against Gamma to L = 2^64, and what the LoRA
rank costs.

Panels of points:

operations   read off the jaxpr (Theorem F.1): Lemma 3.1 as written, the dense gradient, the chain, the fast gradient
counted      d = log2 L, R = Gamma^2 = kappa^2 ln L, tolerance 1/L: g from Chebyshev's remainder, k = binom(d + g, g)
measured     the same where it runs, from sampled queries: k* of uniform inputs at Gamma = kappa sqrt(ln L), d = log2 L,
             for the adapters of Theorem 3.1 (query, value) and for those of Theorem A.1 (key as well)
rank         operations and errors of the fast gradient and of the exact one against r

Relative errors do not change when all tokens are multiplied by Gamma and all weights divided by it.
That makes max |X_K| and max |Q W_K^T| equal to Gamma too, so what is measured lies inside of the
hypotheses of Theorem A.1 as it does of those of Theorem 3.1.
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
from experiments.contenders import needed_degrees, sampled_degrees
from experiments.problems import boxes
from experiments.runner.config import Fields
from lora_limits.gradients import exact
from lora_limits.instruments.comparing import max_error
from lora_limits.instruments.counting import count_operations
from lora_limits.polynomial import needed

VERSION = 2
X64 = True
POINTS = ("lengths", "kappas", "counted", "measured_kappas", "measured", "measured_seeds", "ranks")
ADAPTATIONS = {"partial": ("query", "value"), "full": ("query", "key", "value")}
HIGHEST = 12  # no degree above it is measured
SEEDS_TO = 16  # log2 of the length to which every seed is measured
ALGORITHMS = ("literal", "dense", "chain", "fast")


class Config(Fields):
    """lengths: log2 L of the operation counts, at `width` and `degree`. kappas: Gamma / sqrt(ln L).

    counted, measured: log2 L; measured_seeds: beyond 2^16 tokens the first alone. rows: queries
    drawn. ranks, at rank_length tokens, rank_width and rank_degree.
    """

    lengths: tuple[PositiveInt, ...]
    width: PositiveInt
    degree: PositiveInt
    kappas: tuple[PositiveFloat, ...]
    counted: tuple[PositiveInt, ...]
    measured_kappas: tuple[PositiveFloat, ...]
    measured: tuple[PositiveInt, ...]
    measured_seeds: tuple[int, ...] = (0,)
    rows: PositiveInt = 128
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
        {"panel": "measured", "kappa": kappa, "power": n, "seed": seed}
        for n in config.measured
        for seed in config.measured_seeds[: None if n <= SEEDS_TO else 1]
        for kappa in config.measured_kappas
    ]
    return counts + counted + runs + [{"panel": "rank", "rank": rank} for rank in config.ranks]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """flops; or degree and exponent log k / log L; or those measured; or costs and error at a rank."""
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


def _measured(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """For both adaptations the degree and the interpolated exponent of k* at tolerance 1/L."""
    power = point["power"]
    length = 2**power
    gamma = point["kappa"] * math.sqrt(math.log(length))
    problem = boxes.problem(
        "uniform", point["seed"], length=length, width=power, rank=4, gamma=gamma
    )
    scan = sampled_degrees.scan(
        problem, highest=HIGHEST, rows=config.rows, key=jax.random.key(point["seed"])
    )
    out: dict[str, Any] = {"score_rms": scan.score}
    for name, adapters in ADAPTATIONS.items():
        arrays = [x for array, x in scan.errors.items() if array.split(".")[0] in adapters]
        worst = list(np.max(arrays, axis=0))
        found = needed_degrees.needed(worst, 1 / length, width=power, length=length)
        out[name] = {field: found[field] for field in ("degree", "features", "exponent")}
    return out


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
