"""Seconds of a method against the exact gradient's, once a shape, and where the method pays."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_limits.gradients.cost import exact_method
from lora_limits.gradients.methods import Polynomial
from lora_limits.gradients.solve import gradient
from lora_limits.method import GradientResult, Method
from lora_limits.problem import LoRAProblem

LONGEST = 16384  # tokens that are timed; beyond, times are carried on as L and L^2
# A measurement ends after so many rounds, or the first round after so many seconds.
ROUNDS, MOST_SECONDS = 31, 0.5


def _only_gradient(problem: LoRAProblem, method: Method) -> GradientResult:
    """Without the certificate: the error is measured here."""
    result = gradient(problem, method)
    return GradientResult(result.gradient, result.loss, result.rank)


# The one compiled entry: each method once for each shape.
run = jax.jit(_only_gradient, static_argnames="method")


def stretched(problem: LoRAProblem, length: int) -> LoRAProblem:
    """The same head on `length` tokens, its own over and over: times depend on shapes alone."""

    def rows(x: jax.Array) -> jax.Array:
        return x[jnp.arange(length) % x.shape[0]]

    names = ("x_query", "x_key", "x_value", "target", "rotations")
    longer = {n: jax.tree.map(rows, getattr(problem, n)) for n in names}
    return dataclasses.replace(problem, **longer)


def by_turns(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each after a warm-up.

    By turns, so that what slows the machine slows them all.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > MOST_SECONDS:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}


class Clock:
    """Times by the shapes of a problem, method and length, each measured when first asked for."""

    def __init__(self) -> None:
        self._held: dict[Any, tuple[float, float]] = {}

    def pair(
        self, problem: LoRAProblem, method: Method, length: int | None = None
    ) -> tuple[float, float]:
        """(seconds of the method, of the exact gradient), by turns on the same problem."""
        tokens = problem.x_query.shape[0]
        leaves, structure = jax.tree.flatten(problem)
        # Heads of a model share their shapes, and so their times and programs.
        name = (tuple(x.shape for x in leaves), structure, method, length or tokens)
        if name not in self._held:
            long = problem if length in (None, tokens) else stretched(problem, length)
            if long is not problem and isinstance(method, Polynomial):
                method = dataclasses.replace(method, block_size=None)  # of a short window
            exact = exact_method(long)
            functions = {
                "method": lambda: run(long, method=method),
                "exact": lambda: run(long, method=exact),
            }
            times = by_turns(functions)
            self._held[name] = (times["method"], times["exact"])
        return self._held[name]

    def pays_from(self, problem: LoRAProblem, method: Method) -> int:
        """The length from which the method, at its rank, is faster than the exact gradient.

        This length where it is already; else measured again at the power of two above the length
        that times growing as L and L^2 would give, LONGEST at most, and interpolated, or carried on
        from there. Two significant digits, but longer than this length.
        """
        tokens = problem.x_query.shape[0]
        mine, exact = self.pair(problem, method)
        if mine < exact:
            return tokens
        # L against L^2: the ratio of times falls as 1 / L.
        expected = tokens * mine / exact
        guess = min(2 ** math.ceil(math.log2(expected)), LONGEST)
        if guess <= tokens:
            return max(_rounded(expected), tokens + 1)
        there_mine, there_exact = self.pair(problem, method, guess)
        here = math.log(mine / exact)
        there = math.log(there_mine / there_exact)
        if there >= 0:
            return max(_rounded(guess * there_mine / there_exact), tokens + 1)
        # Where the line through both, in logarithms of length and ratio, crosses 0.
        share = here / (here - there)
        return max(_rounded(tokens * (guess / tokens) ** share), tokens + 1)


def _rounded(length: float) -> int:
    """To two significant digits."""
    unit = 10 ** max(math.floor(math.log10(length)) - 1, 0)
    return round(length / unit) * unit
