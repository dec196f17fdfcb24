"""Contenders for one gradient, timed by turns in one run and held against one reference."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_limits as ll
from experiments.contenders import baselines, subquadratic
from experiments.contenders.methods import exact_methods
from experiments.contenders.truth import (
    REFERENCE_TILE,
    Reference,
    errors,
    of_gradient,
    relative_bound,
)
from lora_limits.factors import random_features
from lora_limits.gradients import chain
from lora_limits.gradients.exact import tiled_loss
from lora_limits.instruments import timing
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.instruments.counting import count_operations
from lora_limits.linalg import dot
from lora_limits.polynomial import monomials
from lora_limits.problem import projections

ROW_BLOCKS = (128, 512)
PILOT = 4096


class Contender(NamedTuple):
    """parts: what is compiled and timed, by name; "gradient" and "loss" are. output: f~ V, for its
    error alone.
    """

    family: str
    parts: dict[str, Callable[[ll.LoRAProblem], Any]]
    features: int | None = None
    output: Callable[[ll.LoRAProblem], jax.Array] | None = None
    counted: bool = False


class Limits(NamedTuple):
    """Rounds and seconds of timing; bytes beyond which a contender is not run; features beyond
    which none is made.
    """

    repeats: int
    max_seconds: float
    max_bytes: float
    most_features: int


def _attend(family: str, attention: baselines.Attention, features: int | None = None) -> Contender:
    """A contender from an attention function."""
    parts = {
        "gradient": lambda p: baselines.gradient(p, attention),
        "loss": lambda p: baselines.loss(p, attention),
    }
    return Contender(family, parts, features, lambda p: baselines.output(p, attention))


def _tiled(block: int) -> Contender:
    method = ll.Exact(block)
    parts = {
        "gradient": lambda p: ll.gradient(p, method).gradient,
        "loss": lambda p: tiled_loss(p, block),
    }
    return Contender("exact", parts, counted=block == REFERENCE_TILE)


def exact_contenders(length: int, *, tuned: bool) -> dict[str, Contender]:
    """Every exact layout there is, tokamax's where it is installed; without `tuned` the tiled one
    at the block of the reference alone.
    """
    if not tuned:
        return {f"tiled {REFERENCE_TILE}": _tiled(REFERENCE_TILE)}
    out = {"dense": _attend("exact", baselines.xla)}
    out |= {f"rows {b}": _attend("exact", baselines.row_blocked(b)) for b in ROW_BLOCKS}
    if importlib.util.find_spec("tokamax"):
        out["tokamax"] = _attend("exact", baselines.tokamax_chunked)
    # The block of the reference is there however short the sequence.
    tiled = exact_methods(max(length, REFERENCE_TILE), name="tiled")
    return out | {name: _tiled(method.block_size or length) for name, method in tiled.items()}


def polynomial(degree: int, width: int) -> Contender:
    """The polynomial gradient; "certified" is the same with its certificate."""
    method = ll.Polynomial(degree)

    def certified(problem: ll.LoRAProblem) -> Any:
        result = ll.gradient(problem, method)
        return result.gradient, result.bound

    parts = {
        "gradient": lambda p: ll.gradient(p, method).gradient,
        "loss": lambda p: ll.gradient(p, method).loss,
        "certified": certified,
    }
    k = monomials.count(width, degree)
    return Contender("polynomial", parts, k, _factored(degree), counted=True)


def _factored(degree: int) -> Callable[[ll.LoRAProblem], jax.Array]:
    def output(problem: ll.LoRAProblem) -> jax.Array:
        u, v = chain.polynomial_factor(problem, degree)
        return dot(u, dot(v.T, projections(problem)[2]))

    return output


def literal_chain(degree: int, width: int) -> Contender:
    """The paper's own algorithm, factors formed."""
    method = ll.Chain(degree)
    parts = {
        "gradient": lambda p: ll.gradient(p, method).gradient,
        "loss": lambda p: ll.gradient(p, method).loss,
    }
    return Contender("chain", parts, monomials.count(width, degree), _factored(degree))


def favor(features: int, width: int, seed: int) -> Contender:
    """FAVOR+; its frequencies are drawn beforehand."""
    frequencies = random_features.orthogonal_frequencies(jax.random.key(seed), features, width)
    return _attend("favor", baselines.favor(frequencies), features)


def nystrom(landmarks: int) -> Contender:
    """Nystrom on as many landmarks as others have features."""
    return _attend("nystrom", baselines.nystrom(landmarks), landmarks)


def subquadratic_rivals(seed: int) -> dict[str, Contender]:
    """HyperAttention, Thinformer and kNN attention, each at three sizes: keys that a query meets."""
    key = jax.random.key(seed)
    out = {}
    for n in (32, 64, 128):
        out[f"hyper {2 * n}"] = _attend("hyper", subquadratic.hyper(n, n, key), 2 * n)
        out[f"knn {2 * n}"] = _attend("knn", subquadratic.knn(n, n, key), 2 * n)
    for g in (1, 2, 3):
        out[f"thinformer {g}"] = _attend("thinformer", subquadratic.thinformer(g, key))
    return out


def library(name: str, method: ll.Method) -> Contender:
    """A method of the library as a contender."""
    parts = {
        "gradient": lambda p: ll.gradient(p, method).gradient,
        "loss": lambda p: ll.gradient(p, method).loss,
    }
    return Contender(name, parts)


def exact_seconds(problem: ll.LoRAProblem) -> float:
    """Seconds of one exact gradient, from a run on at most PILOT tokens."""
    length = problem.target.shape[0]
    # Exact gradients cost L^2: a short run tells how long a long one takes.
    n = min(length, PILOT)
    cut = {name: getattr(problem, name)[:n] for name in ("x_query", "x_key", "x_value", "target")}
    run = jax.jit(_tiled(REFERENCE_TILE).parts["gradient"])
    pilot = dataclasses.replace(problem, **cut)
    time = timing.median_time(run, pilot, repeats=1, max_seconds=1.0)
    return time["seconds"] * (length / n) ** 2


def output_error(problem: ll.LoRAProblem, contender: Contender, true: Reference) -> float | None:
    """Relative Frobenius error of f~ V on the reference's rows; None for a contender that forms no
    output.
    """
    if contender.output is None:
        return None
    out = np.asarray(jax.jit(contender.output)(problem), np.float64)[true.rows]
    return frobenius_error(out, true.output)


def compile_all(problem: ll.LoRAProblem, contenders: Mapping[str, Contender], limits: Limits):
    """(metrics, programs) by contender and part: compile seconds, temporary bytes, and what is
    small enough to run.
    """
    out: dict[str, dict[str, Any]] = {}
    programs: dict[tuple[str, str], Any] = {}
    for name, contender in contenders.items():
        out[name] = {"family": contender.family, "features": contender.features}
        for part, function in contender.parts.items():
            compiled, seconds = timing.compile_seconds(jax.jit(function), problem)
            size = timing.temporary_bytes(compiled)
            out[name][part] = {"compile": seconds, "temporary": size}
            if (size or 0) <= limits.max_bytes:
                programs[name, part] = compiled
        if contender.counted:
            # Last: tracing it first would warm the caches that compile times are to do without.
            counted = count_operations(contender.parts["gradient"], problem)
            out[name]["operations"] = counted["flops"]
    return out, programs


def _forward(
    problem: ll.LoRAProblem, contender: Contender, limits: Limits, true: Reference
) -> dict[str, float | None]:
    """The error of the output, where a contender forms one that fits into memory."""
    # The factors of an output are two L x k arrays and what they are made from.
    size = 24.0 * problem.target.shape[0] * (contender.features or 0)
    if not contender.features or size > limits.max_bytes:
        return {}
    return {"output_error": output_error(problem, contender, true)}


def race(
    problems: Sequence[ll.LoRAProblem],
    contenders: Mapping[str, Contender],
    limits: Limits,
    *,
    true: Sequence[Reference] = (),
    beside: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(metrics by contender, times of the calls in `beside`), all timed by turns on the first of
    the problems, which have one shape.

    Where `true` has a reference of each: "error" and what `errors` has beside it. Wherever a
    gradient is certified: its "bound", beside its largest entry. Both are the largest of all
    problems, and "by_seed" has each; all else is of the first.
    """
    problem = problems[0]
    out, programs = compile_all(problem, contenders, limits)
    calls = {" ".join(key): functools.partial(run, problem) for key, run in programs.items()}
    times = timing.interleaved(
        calls | dict(beside), repeats=limits.repeats, max_seconds=limits.max_seconds
    )
    for name, part in programs:
        out[name][part] |= times[f"{name} {part}"]
    for name, contender in contenders.items():
        by_seed: dict[str, list[float]] = {}
        if true and (name, "gradient") in programs:
            gradients = [programs[name, "gradient"](p) for p in problems]
            each = [errors(g, t) for g, t in zip(gradients, true, strict=True)]
            by_seed |= {what: [e[what] for e in each] for what in ("error", "max_error")}
            out[name] |= each[0] | _forward(problem, contender, limits, true[0])
        if (name, "certified") in programs:
            found = [programs[name, "certified"](p) for p in problems]
            # beside its own gradient where there is no other
            held = true or [of_gradient(gradient) for gradient, _ in found]
            pairs = zip(found, held, strict=True)
            by_seed["bound"] = [relative_bound(bound, h) for (_, bound), h in pairs]
        if by_seed:
            out[name] |= {what: float(np.max(each)) for what, each in by_seed.items()}
            out[name]["by_seed"] = by_seed
    return out, {name: times[name] for name in beside}


def search(
    problem: ll.LoRAProblem,
    make: Callable[[int], Contender],
    limits: Limits,
    *,
    most_seconds: float,
    true: Reference,
) -> list[dict[str, Any]]:
    """Features in powers of two from 8 up, until a gradient takes longer than `most_seconds`: times
    and errors.
    """
    tried: list[dict[str, Any]] = []
    k = 8
    most = min(problem.target.shape[0], limits.most_features)
    while k <= most and (not tried or tried[-1]["seconds"] <= most_seconds):
        contender = make(k)
        compiled = jax.jit(contender.parts["gradient"]).lower(problem).compile()
        if (timing.temporary_bytes(compiled) or 0) > limits.max_bytes:
            break
        share = limits.max_seconds / 4
        time = timing.median_time(compiled, problem, repeats=limits.repeats, max_seconds=share)
        found = errors(compiled(problem), true)
        forward = output_error(problem, contender, true)
        tried.append({"features": k, **time, **found, "output_error": forward})
        k *= 2
    return tried
