"""The factors on the clock beside the best exact gradient, by turns, and how far each is from it."""

from __future__ import annotations

import functools
from typing import Any

import jax

import lora_limits as ll
from experiments.contenders.methods import exact_methods, fastest, gradient_alone
from lora_limits.instruments.comparing import frobenius_error, named
from lora_limits.instruments.timing import interleaved

FACTORS: dict[str, ll.Method] = {
    "skeleton": ll.Skeleton(128),
    "sparse": ll.SparseLowRank(64, 64),
    "tree": ll.BlockTree(),
}


def measured(problem: ll.LoRAProblem, *, repeats: int, max_seconds: float) -> dict[str, Any]:
    """{"exact": times of the fastest tile, "factors": {name: times | {"error"}}}.

    error: of the worst array, || G~ - G || / || G ||. Times as `interleaved` gives them.
    """
    exact = exact_methods(problem.target.shape[0])
    calls = {name: functools.partial(_program(m), problem) for name, m in (exact | FACTORS).items()}
    took = interleaved(calls, repeats=repeats, max_seconds=max_seconds)
    best = fastest(took, exact)
    want = named(calls[best]())
    found = {}
    for name in FACTORS:
        got = named(calls[name]())
        error = max(frobenius_error(got[array], x) for array, x in want.items())
        found[name] = took[name] | {"error": error}
    return {"exact": took[best] | {"name": best}, "factors": found}


@functools.cache
def _program(method: ll.Method) -> Any:
    return jax.jit(functools.partial(gradient_alone, method=method))
