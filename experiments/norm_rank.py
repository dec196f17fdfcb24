"""What the norm bound and the LoRA rank do: error over (Gamma, k), and Gamma and k* over (adapter
size, r).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import degrees
from experiments.runner.config import Fields, Tokens
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.instruments.compiling import quick_jit

VERSION = 1
POINTS = ("gammas", "degrees", "sizes", "conventions")
X64 = True


class Config(Fields):
    """Error panel: gammas x degrees. Adapter panel: sizes (std of the entries of A and B) x ranks x
    conventions.
    """

    length: Tokens
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gammas: tuple[PositiveFloat, ...]
    degrees: tuple[PositiveInt, ...]
    sizes: tuple[PositiveFloat, ...]
    ranks: tuple[PositiveInt, ...]
    conventions: tuple[Literal["alpha/r", "alpha/sqrt(r)"], ...] = ("alpha/r", "alpha/sqrt(r)")
    alpha: PositiveFloat = 16.0
    base_gamma: PositiveFloat = 0.5
    tolerance: PositiveFloat = 0.01
    seed: int = 0


def points(config: Config) -> list[dict[str, Any]]:
    """The error panel, degree by degree (one compilation each), then the adapter panel."""
    out: list[dict[str, Any]] = [
        {"kind": "error", "degree": d, "gamma": g} for d in config.degrees for g in config.gammas
    ]
    out += [
        {"kind": "adapter", "convention": c, "rank": r, "size": s}
        for c in config.conventions
        for r in config.ranks
        for s in config.sizes
    ]
    return out


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Errors and certified bounds of one (Gamma, degree), or the norms and k* of one adapter."""
    return _error(point, config) if point["kind"] == "error" else _adapter(point, config)


def _error(point: dict[str, Any], config: Config) -> dict[str, Any]:
    make = functools.partial(
        ll.random_problem, length=config.length, width=config.width, rank=config.rank
    )
    # The same problem at every degree: its gamma alone changes along a row of the panel.
    problem = quick_jit(make)(jax.random.key(config.seed), gamma=point["gamma"])
    run = quick_jit(ll.gradient, static_argnames="method")
    exact = jax.tree.leaves(run(problem, method=ll.Exact(1024)).gradient)
    result = run(problem, method=ll.Polynomial(point["degree"]))
    pairs = list(zip(jax.tree.leaves(result.gradient), exact, strict=True))
    top = max(float(np.abs(x).max()) for x in exact)
    return {
        "features": result.rank,
        "max_error": max(float(np.abs(got - want).max()) for got, want in pairs) / top,
        "frobenius_error": max(frobenius_error(got, want) for got, want in pairs),
        "bound": max(float(b) for b in jax.tree.leaves(result.bound)) / top,
        "normaliser": float(np.asarray(result.normaliser)),
    }


def _adapter(point: dict[str, Any], config: Config) -> dict[str, Any]:
    key = jax.random.key(config.seed)
    make = functools.partial(ll.random_problem, length=config.length, width=config.width, rank=1)
    base = quick_jit(make)(key, gamma=config.base_gamma)
    a_key, b_key = jax.random.split(jax.random.key(config.seed + 1))
    r = point["rank"]
    d = config.width
    # One large draw, cut to the rank: curves over r differ by r, not by the draw.
    a = point["size"] * jax.random.normal(a_key, (max(config.ranks), d))[:r]
    b = point["size"] * jax.random.normal(b_key, (d, max(config.ranks)))[:, :r]
    scale = config.alpha / (r if point["convention"] == "alpha/r" else math.sqrt(r))
    # The frozen query weight of the base problem has its own adapter merged, so that only the new
    # one moves.
    merged = base.adapters["query"]
    query = base.weights.query + base.scale * jnp.matmul(merged.b, merged.a)
    problem = ll.LoRAProblem(
        base.x_query,
        base.x_key,
        base.x_value,
        base.target,
        weights=ll.AttentionWeights(query, base.weights.key, base.weights.value),
        adapters={"query": ll.Adapter(a, b)},
        scale=scale,
        beta=base.beta,
    )
    report = quick_jit(ll.norm_report)(problem)
    run = quick_jit(ll.gradient, static_argnames="method")
    exact = run(problem, method=ll.Exact(1024)).gradient
    # Every degree in turn until two in a row are enough, so that k* is the smallest.
    scan = degrees.errors_by_degree(problem, range(1, degrees.HIGHEST + 1), exact, config.tolerance)
    degree = degrees.first_below(scan, "max_error", config.tolerance)
    return {
        "gamma": float(report.gamma),
        "gamma_ratio": float(report.gamma_ratio),
        "update": float(report.query_update),
        "score_bound": float(report.score_bound),
        "degree": degree,
        "features": None if degree is None else math.comb(d + degree, degree),
    }
