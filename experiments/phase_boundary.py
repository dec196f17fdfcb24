"""Theorems 3.1 and 4.1 as a map: where over (Gamma, L) a polynomial gradient is cheaper than the
exact one.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import degrees
from experiments.contenders.methods import exact_methods, fastest, gradient_alone
from experiments.runner.config import Fields
from lora_limits.gradients.exact import dense_terms
from lora_limits.instruments.compiling import quick_jit
from lora_limits.instruments.timing import interleaved
from lora_limits.polynomial.needed import degree_needed, width_exponent

VERSION = 1
POINTS = ("lengths", "gammas", "slices", "width", "counted_exponents", "counted_ratios")
X64 = True


class Config(Fields):
    """lengths x gammas, at a fixed width and at width ceil(log2 L); beta = 1/width, tolerance
    L^-power (relative).

    certified_lengths: where the certificate is run as well. most_work: tokens times features beyond
    which an approximation is not timed.
    """

    lengths: tuple[PositiveInt, ...]
    gammas: tuple[PositiveFloat, ...]
    slices: tuple[Literal["fixed", "growing"], ...] = ("fixed", "growing")
    width: PositiveInt = 4
    rank: PositiveInt = 2
    power: PositiveFloat = 1.0
    seed: int = 0
    repeats: PositiveInt = 5
    max_seconds: PositiveFloat = 2.0
    svd_length: int = Field(default=1024, ge=0)
    certified_lengths: tuple[PositiveInt, ...]
    most_work: PositiveFloat = 4e7
    counted_exponents: tuple[PositiveInt, ...] = (10, 16, 24, 32, 48, 64)
    counted_ratios: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0, 2.0)


def _width(config: Config, kind: str, length: int) -> int:
    return config.width if kind == "fixed" else math.ceil(math.log2(length))


def points(config: Config) -> list[dict[str, Any]]:
    """Measured points, then those that are only counted."""
    out = [
        {"kind": "measured", "slice": s, "length": n, "width": _width(config, s, n), "gamma": g}
        for s in config.slices
        for n in config.lengths
        for g in config.gammas
    ]
    out += [
        {
            "kind": "counted",
            "slice": s,
            "log2_length": e,
            "width": _width(config, s, 2**e),
            "ratio": r,
        }
        for s in config.slices
        for r in config.counted_ratios
        for e in config.counted_exponents
    ]
    return out


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """A measured point: degrees and features needed, times, ranks. A counted one: the exponent log
    k* / log L.
    """
    return _counted(point, config) if point["kind"] == "counted" else _measured(point, config)


def _counted(point: dict[str, Any], config: Config) -> dict[str, Any]:
    log_length = point["log2_length"] * math.log(2)
    gamma = point["ratio"] * math.sqrt(log_length)
    tolerance = math.exp(-config.power * log_length)
    # The normaliser has an error as well: (1 + T) / (1 - T) - 1 = 2 T / (1 - T).
    degree = degree_needed(gamma**2, tolerance / (2 + tolerance))  # 2 T / (1 - T) <= tolerance
    return {
        "gamma": gamma,
        "degree": degree,
        "exponent": width_exponent(point["width"], degree, log_length),
    }


def _measured(point: dict[str, Any], config: Config) -> dict[str, Any]:
    make = functools.partial(
        ll.random_problem, length=point["length"], width=point["width"], rank=config.rank
    )
    problem = quick_jit(make)(jax.random.key(config.seed), gamma=point["gamma"])
    # Quick compilation pays only while the L x L work is small
    jit = quick_jit if point["length"] <= 1024 else jax.jit
    run = jit(ll.gradient, static_argnames="method")
    # Theorem 3.1 asks for 1/poly(L).
    tolerance = float(point["length"]) ** -config.power
    exact = run(problem, method=ll.Exact(min(1024, point["length"]))).gradient
    scan = degrees.errors_by_degree(problem, range(1, degrees.HIGHEST + 1), exact, tolerance)
    degree = degrees.first_below(scan, "max_error", tolerance)
    report = quick_jit(ll.norm_report)(problem)
    out: dict[str, Any] = {
        "tolerance": tolerance,
        "gamma_ratio": float(report.gamma_ratio),
        "score_bound": float(report.score_bound),
        "degree": degree,
        "features": None,
        "exponent": None,
    }
    if degree is not None:
        out["features"] = math.comb(point["width"] + degree, degree)
        out["exponent"] = math.log(out["features"]) / math.log(point["length"])
    if point["length"] <= config.svd_length:
        # The rank that any factor of f would need, a polynomial or not.
        values = np.linalg.svd(np.asarray(dense_terms(problem)["f"]), compute_uv=False)
        out["svd_rank"] = int((values > tolerance * values[0]).sum())
    if degree is not None:
        top = max(float(np.abs(x).max()) for x in jax.tree.leaves(exact))
        if point["length"] in config.certified_lengths:
            out |= _certified(problem, degree, tolerance * top, config)
        out |= _timed(problem, degree, config)
    return out


def _fits(problem: Any, degree: int, config: Config) -> bool:
    length = problem.x_query.shape[0]
    width = problem.weights.query.shape[1]
    k = math.comb(width + degree, degree)
    # With more features than twice the tokens none can win.
    return k <= 2 * length and k * length <= config.most_work


def _certified(problem: Any, degree: int, tolerance: float, config: Config) -> dict[str, Any]:
    """The first degree, from the measured one on, whose certificate meets the tolerance; None where
    none was run.
    """
    run = quick_jit(ll.gradient, static_argnames="method")
    # Two degrees more are tried, as a guarantee costs something.
    for g in range(degree, degree + 3):
        if not _fits(problem, g, config):
            break
        bound = run(problem, method=ll.Polynomial(g)).bound
        if all(float(b) <= tolerance for b in jax.tree.leaves(bound)):
            k = math.comb(problem.weights.query.shape[1] + g, g)
            return {"certified_degree": g, "certified_features": k}
    return {"certified_degree": None, "certified_features": None}


def _timed(problem: Any, degree: int, config: Config) -> dict[str, Any]:
    """float32 times of the gradient at the measured degree and of the best exact one, in one
    run.
    """
    if not _fits(problem, degree, config):
        return {"seconds": None, "exact_seconds": None, "speed_up": None}
    # Times are in float32, as training is; degrees and errors are in float64.
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem)
    exact = exact_methods(problem.x_query.shape[0], (1024,), dense_up_to=2048)
    methods: dict[str, ll.Method] = {"polynomial": ll.Polynomial(degree), **exact}
    run = jax.jit(gradient_alone, static_argnames="method")
    calls = {n: functools.partial(run, single, method=method) for n, method in methods.items()}
    times = interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    ours = times["polynomial"]
    best = times[fastest(times, exact)]["seconds"]
    return {
        "seconds": ours["seconds"],
        "spread": ours["spread"],
        "exact_seconds": best,
        "speed_up": best / ours["seconds"],
    }
