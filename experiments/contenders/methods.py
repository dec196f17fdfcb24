"""The library's methods as contenders: the exact gradient at every block it may be tiled in, which
was the fastest, what one costs before it is timed, and how far each is from the exact gradient.

No experiment compares with one block alone where another might have been faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lora_limits as ll
from lora_limits.instruments import timing
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.instruments.compiling import quick_jit
from lora_limits.instruments.counting import count_operations

BLOCKS = (512, 1024, 2048)


def exact_methods(
    length: int,
    blocks: Sequence[int] = BLOCKS,
    *,
    name: str = "exact",
    otherwise: int | None = None,
    dense_up_to: int = 0,
) -> dict[str, ll.Exact]:
    """{"exact 512": Exact(512), ...}: the library's exact gradient at every block that is no longer
    than the sequence, and up to `dense_up_to` tokens "exact dense" as well.

    otherwise: the block where none of `blocks` fits, `length` itself unless given. name: the first
    word of each.
    """
    fitting = [block for block in blocks if block <= length] or [otherwise or length]
    out = {f"{name} {block}": ll.Exact(block) for block in fitting}
    if length <= dense_up_to:
        out[f"{name} dense"] = ll.Exact()
    return out


def fastest(times: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
    """Of the contenders `names` the one with the least median time; the first of equals."""
    return min(names, key=lambda name: times[name]["seconds"])


def gradient_alone(problem: ll.LoRAProblem, method: ll.Method) -> dict[str, ll.Adapter]:
    """The gradient without its certificate, which the compiler then leaves out."""
    return ll.gradient(problem, method).gradient


def compiled(problem: ll.LoRAProblem, method: ll.Method) -> tuple[dict[str, Any], Any]:
    """({"compile": seconds, "temporary": bytes, "operations"}, program) of `gradient_alone`."""
    gradient = functools.partial(gradient_alone, method=method)
    program, seconds = timing.compile_seconds(jax.jit(gradient), problem)
    # Counted last: tracing it first would warm the caches that compile times are to do without.
    operations = count_operations(gradient, problem)["flops"]
    size = timing.temporary_bytes(program)
    return {"compile": seconds, "temporary": size, "operations": operations}, program


@functools.cache
def _gradient(method: ll.Method) -> Callable[[ll.LoRAProblem], Any]:
    return quick_jit(functools.partial(gradient_alone, method=method))


def _flat(problem: ll.LoRAProblem, method: ll.Method) -> dict[str, np.ndarray]:
    """The gradient of each projection, A and B as one vector."""
    found = _gradient(method)(problem)
    return {
        name: np.concatenate([np.ravel(z) for z in jax.tree.leaves(adapter)]).astype(float)
        for name, adapter in found.items()
    }


def errors_by_method(
    problems: Iterable[ll.LoRAProblem], methods: Mapping[str, ll.Method]
) -> dict[str, list[float]]:
    """Of every method on every problem: the relative Frobenius error of A and B, the worst of the
    projections.
    """
    out: dict[str, list[float]] = {name: [] for name in methods}
    for problem in problems:
        want = _flat(problem, ll.Exact())
        for name, method in methods.items():
            got = _flat(problem, method)
            out[name].append(max(frobenius_error(got[n], w) for n, w in want.items()))
    return out
