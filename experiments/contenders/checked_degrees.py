"""What sampled queries say of an error, held against exact gradients over a few targets."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

import lora_limits as ll
from experiments.contenders.sampled_degrees import Scan
from lora_limits.instruments.comparing import named

BLOCK = 1024  # of the tiled exact gradient


def with_target(problem: ll.LoRAProblem, target: Any) -> ll.LoRAProblem:
    """The problem with another target."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: target if path[0].name == "target" else x, problem
    )


def measured(
    problem: ll.LoRAProblem, degrees: Iterable[int], *, targets: int
) -> dict[int, dict[str, float]]:
    """{degree: {array: relative error}} of the polynomial gradient: root mean squares over targets of
    unit variance, of the error over that of the exact gradient. O(targets L^2 d).
    """
    methods = {g: ll.Polynomial(g) for g in degrees}
    exact = _compiled(ll.Exact(min(BLOCK, problem.target.shape[0])))
    error: dict[int, dict[str, float]] = {g: {} for g in methods}
    size: dict[str, float] = {}
    for n in range(targets):
        drawn = jax.random.normal(jax.random.key(n), problem.target.shape, problem.dtype)
        here = with_target(problem, problem.target + drawn)
        want = named(exact(here))
        for name, x in want.items():
            size[name] = size.get(name, 0.0) + float((x**2).sum())
        for g, method in methods.items():
            for name, x in named(_compiled(method)(here)).items():
                gap = float(((x - want[name]) ** 2).sum())
                error[g][name] = error[g].get(name, 0.0) + gap
    return {
        g: {name: float(np.sqrt(x / size[name])) for name, x in each.items()}
        for g, each in error.items()
    }


def beside(scan: Scan, found: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{degree: the worst array's error, measured and estimated, the standard error, and the lowest
    and highest ratio of estimate to measurement over the arrays}.
    """
    worst, spread = scan.worst()
    out = {}
    for g, each in found.items():
        ratios = [float(scan.errors[name][g]) / x for name, x in each.items()]
        out[str(g)] = {
            "measured": max(each.values()),
            "estimated": float(worst[g]),
            "spread": float(spread[g]),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return out


@functools.cache
def _compiled(method: ll.Method):
    return jax.jit(lambda problem: ll.gradient(problem, method).gradient)
