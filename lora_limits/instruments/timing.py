"""Timing under JAX's asynchronous dispatch: medians and their spread; compile time; memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lora_limits.checks import fail

WAKE = 3  # a call so many times as fast as the one before it runs in its wake,
LEAST = 0.01  # if that took so many seconds


def median_time(
    function: Callable[..., Any], *args: Any, repeats: int, max_seconds: float
) -> dict[str, Any]:
    """Time `function(*args)` as `interleaved` does, alone."""
    alone = {"": functools.partial(function, *args)}
    return interleaved(alone, repeats=repeats, max_seconds=max_seconds)[""]


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, max_seconds: float
) -> dict[str, dict[str, Any]]:
    """Times of several contenders by turns in one run: what slows the machine slows them all.

    Each is called once to warm up (and compile), then in up to `repeats` rounds, until the rounds
    have taken `max_seconds` in all; one round there is always. For each name: "seconds", the
    median; "spread", the interquartile range in seconds; "repeats", the rounds there were;
    "rounds", the seconds of each. A call that takes WAKE times less than the one before it is
    repeated, up to a third of that one's time, and the last counts: while the memory of a large
    program is given back, a small one waits.
    Raises ValueError for repeats below 1.
    """
    if repeats < 1:
        fail("repeats", repeats, "at least 1")
    # JAX returns before the work is done, so every call is waited for.
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    before = 0.0
    for turn in range(repeats):
        # Back and forth: no contender always runs in the wake of the same other.
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            took, spent = _seconds(functions[name]), 0.0
            while before > max(WAKE * took, LEAST) and spent < before / WAKE:
                took = _seconds(functions[name])
                spent += took
            times[name].append(took)
            before = took
        if time.perf_counter() - began >= max_seconds:
            break
    return {name: _summary(seconds) for name, seconds in times.items()}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _summary(seconds: list[float]) -> dict[str, Any]:
    # Quartiles: one pause of the machine moves neither.
    lower, median, upper = np.percentile(seconds, [25, 50, 75])
    told = {"seconds": float(median), "spread": float(upper - lower)}
    return told | {"repeats": len(seconds), "rounds": seconds}


def ratio(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> tuple[float, float]:
    """(how many times as fast, half the interquartile range), of two of one `interleaved`.

    Of the ratios round by round: a machine that is slower for a while is so for both, and moves
    them less than it moves the medians of either.
    """
    each = np.asarray(slow["rounds"]) / np.asarray(fast["rounds"])
    lower, median, upper = np.percentile(each, [25, 50, 75])
    return float(median), float(upper - lower) / 2


def compile_seconds(jitted: Any, *args: Any) -> tuple[Any, float]:
    """(the compiled form of a jitted function for `args`, seconds of tracing and compiling).

    A function traced or compiled for such arguments before may come out of JAX's caches in no time.
    """
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - start


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes that a compiled function asks for beside inputs and outputs; None if unknown."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
