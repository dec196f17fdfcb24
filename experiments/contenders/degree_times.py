"""Every degree of the polynomial gradient on the clock beside the best exact gradient, by turns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

import lora_limits as ll
from experiments.contenders import race
from lora_limits.instruments.timing import interleaved, temporary_bytes

MAX_BYTES = 6e9  # an exact contender that asks for more is not run
IN_THE_RACE = 2.0  # times as slow as the fastest in the first round, and it is not run again


def times(
    problem: ll.LoRAProblem, degrees: Sequence[int], *, repeats: int, max_seconds: float
) -> dict[str, Any]:
    """{"best": name, "exact": {name: times}, "degrees": {g: times}, "left_out": {name: seconds}}.

    Exact: every layout of `race.exact_contenders`, those out of the race after one round left out.
    Times as `interleaved` gives them.
    """
    width = problem.weights.query.shape[1]
    calls = {}
    for name, contender in race.exact_contenders(problem.target.shape[0], tuned=True).items():
        program = jax.jit(contender.parts["gradient"]).lower(problem).compile()
        if (temporary_bytes(program) or 0) <= MAX_BYTES:
            calls[name] = functools.partial(program, problem)
    first = interleaved(calls, repeats=1, max_seconds=1.0)
    least = min(x["seconds"] for x in first.values())
    racing = {n: call for n, call in calls.items() if first[n]["seconds"] <= IN_THE_RACE * least}
    exact = list(racing)
    for g in degrees:
        gradient = race.polynomial(g, width).parts["gradient"]
        racing[str(g)] = functools.partial(jax.jit(gradient), problem)
    took = interleaved(racing, repeats=repeats, max_seconds=max_seconds)
    return {
        "best": min(exact, key=lambda name: took[name]["seconds"]),
        "exact": {name: took[name] for name in exact},
        "degrees": {str(g): took[str(g)] for g in degrees},
        "left_out": {n: x["seconds"] for n, x in first.items() if n not in exact},
    }
