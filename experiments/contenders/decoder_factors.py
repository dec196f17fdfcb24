"""What reaches the heads of a decoder: errors by width on each head, and times at one length."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import lora_limits as ll
from experiments.contenders import truth
from experiments.contenders.methods import compiled, exact_methods, fastest
from lora_limits.instruments import timing
from lora_limits.instruments.compiling import quick_jit

NEEDED = {"causal", "rotations"}
TILE = 512


def able(makers: Mapping[str, Any]) -> list[str]:
    """Names of the methods that know causality and rotations; the others would refuse the heads."""
    return [name for name, make in makers.items() if make(2).knows >= NEEDED]


@functools.cache
def _quick(method: ll.Method) -> Any:
    """problem -> (gradient, its estimated error, whether the method says it failed, or None)."""

    def run(problem):
        result = ll.gradient(problem, method)
        return result.gradient, result.relative_error, result.failed

    return quick_jit(run)


def true_gradient(problem: ll.LoRAProblem) -> truth.Reference:
    """The exact gradient, for `errors`."""
    return truth.of_gradient(_quick(ll.Exact(TILE))(problem)[0])


def errors(
    problem: ll.LoRAProblem, true: truth.Reference, make: Any, widths: Sequence[int]
) -> list[dict[str, Any]]:
    """For each width the relative Frobenius errors of the arrays, their estimates, failure."""
    found = []
    for width in widths:
        gradient, estimated, failed = _quick(make(width))(problem)
        row = {"width": width, **truth.errors(gradient, true), "estimated": None, "failed": None}
        if estimated is not None:
            row["estimated"] = max(float(x) for x in truth.named(estimated).values())
            row["failed"] = bool(failed)
        found.append(row)
    return found


def times(problem: ll.LoRAProblem, methods: Mapping[str, ll.Method], **how: Any) -> dict[str, Any]:
    """{"best": name of the fastest exact tile, "contenders": {name: times, operations, error}}."""
    exact = exact_methods(problem.target.shape[0])
    found, programs = {}, {}
    for name, method in (exact | dict(methods)).items():
        found[name], programs[name] = compiled(problem, method)
    calls = {name: functools.partial(program, problem) for name, program in programs.items()}
    took = timing.interleaved(calls, **how)
    best = fastest(took, exact)
    true = truth.of_gradient(programs[best](problem))
    for name, row in found.items():
        row |= took[name]
        if name not in exact:
            row |= truth.errors(programs[name](problem), true)
    return {"best": best, "contenders": found}
