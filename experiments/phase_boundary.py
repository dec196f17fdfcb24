"""Theorems 3.1 and 4.1 as a map: where over (Gamma, L) a polynomial gradient is cheaper than the
exact one.

Kinds of points:

accuracy   one problem of a family: relative errors of every degree, per array, from sampled queries
           (contenders/sampled_degrees.py), and the degree and k* that each tolerance needs
time       one (L, d): seconds of every degree that may win and of every exact contender, by turns;
           neither depends on the numbers in a problem, so cells of one (L, d) share them
factor     one uniform problem: errors and seconds of the factors that promise nothing, beside exact
rank       accuracy again, over r: the rank of the adapters
check      one problem: the estimated errors beside those of polynomial gradients against exact ones
stream     tokens in a file, read chunk by chunk: seconds of one degree, its error from sampled
           queries, and what the exact gradient would take, extrapolated
counted    beyond what runs: the degree that the bound R asks for, and its exponent log k* / log L
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import (
    checked_degrees,
    degree_times,
    factor_times,
    map_cells,
    sampled_degrees,
    streaming,
)
from experiments.problems import boxes
from experiments.runner.config import Fields
from lora_limits.polynomial.needed import degree_needed, width_exponent

VERSION = 2
POINTS = (
    "lengths",
    "gammas",
    "families",
    "seeds",
    "widths",
    "further",
    "further_lengths",
    "long_lengths",
    "long_gammas",
    "long_families",
    "timed",
    "timed_width",
    "factored",
    "factored_gammas",
    "ranks",
    "rank_length",
    "rank_gamma",
    "checked",
    "checked_targets",
    "streamed",
    "streamed_width",
    "streamed_gamma",
    "streamed_degree",
    "counted_exponents",
    "counted_ratios",
)
X64 = True

Family = Literal["uniform", "gaussian", "outliers", "gadget"]


class Config(Fields):
    """lengths x gammas x families x seeds, at every fixed width and at width ceil(log2 L).

    further x further_lengths: further families, with the same gammas, seeds and widths.
    long_lengths x long_gammas x long_families: the same at width ceil(log2 L), one seed. R =
    gamma^2 bounds the scores. rows: queries drawn. timed: lengths of the "time" points, at the
    timed_width and at ceil(log2 L); degrees to most_degree whose k is at most 2 L. factored x
    factored_gammas: of the "factor" points, at width ceil(log2 L). ranks: of the "rank" points, one
    length and norm, every seed. streamed: lengths of the "stream" points; checked: of the "check"
    points, against exact gradients of checked_targets targets.
    """

    lengths: tuple[PositiveInt, ...]
    gammas: tuple[PositiveFloat, ...]
    families: tuple[Family, ...]
    seeds: tuple[int, ...]
    widths: tuple[PositiveInt, ...] = (8,)
    further: tuple[Family, ...] = ()
    further_lengths: tuple[PositiveInt, ...] = ()
    long_lengths: tuple[PositiveInt, ...] = ()
    long_gammas: tuple[PositiveFloat, ...] = ()
    long_families: tuple[Family, ...] = ()
    rank: PositiveInt = 4
    rows: PositiveInt = 128
    timed: tuple[PositiveInt, ...]
    timed_width: PositiveInt = 8
    most_degree: PositiveInt = 10
    repeats: PositiveInt = 5
    max_seconds: PositiveFloat = 10.0
    factored: tuple[PositiveInt, ...] = ()
    factored_gammas: tuple[PositiveFloat, ...] = ()
    ranks: tuple[PositiveInt, ...] = ()
    rank_length: PositiveInt = 4096
    rank_gamma: PositiveFloat = 1.0
    checked: tuple[PositiveInt, ...] = ()
    checked_degrees: tuple[PositiveInt, ...] = (2, 3, 4)
    checked_targets: PositiveInt = 3
    streamed: tuple[PositiveInt, ...] = ()
    streamed_width: PositiveInt = 8
    streamed_gamma: PositiveFloat = 0.7
    streamed_degree: PositiveInt = 4
    counted_exponents: tuple[PositiveInt, ...] = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    counted_ratios: tuple[PositiveFloat, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)


def _growing(length: int) -> int:
    return math.ceil(math.log2(length))


def points(config: Config) -> list[dict[str, Any]]:
    """Accuracy, a whole map of one seed after another; then times; then those that are counted."""
    slices = [("fixed", width) for width in config.widths] + [("growing", 0)]
    out: list[dict[str, Any]] = []
    maps = ((config.lengths, config.families), (config.further_lengths, config.further))
    for seed, (lengths, families) in itertools.product(config.seeds, maps):
        for kind, width in slices:
            for n, family in itertools.product(lengths, families):
                out += [_cell(kind, family, n, width, g, seed) for g in config.gammas]
    for n in config.long_lengths:
        for family in config.long_families:
            out += [_cell("growing", family, n, 0, g, config.seeds[0]) for g in config.long_gammas]
    for n in config.timed:
        widths = {"fixed": config.timed_width, "growing": _growing(n)}
        out += [{"kind": "time", "slice": s, "length": n, "width": d} for s, d in widths.items()]
    for n in config.factored:
        named = {"kind": "factor", "length": n, "width": _growing(n)}
        out += [named | {"gamma": g} for g in config.factored_gammas]
    for seed in config.seeds:
        cell = _cell("growing", "uniform", config.rank_length, 0, config.rank_gamma, seed)
        out += [cell | {"kind": "rank", "rank": r} for r in config.ranks]
    out += [
        {
            "kind": "check",
            "family": family,
            "length": n,
            "width": config.timed_width,
            "gamma": 1.0,
            "targets": config.checked_targets,
        }
        for n in config.checked
        for family in ("uniform", "gaussian")
    ]
    out += [
        {
            "kind": "stream",
            "length": n,
            "width": config.streamed_width,
            "gamma": config.streamed_gamma,
            "degree": config.streamed_degree,
        }
        for n in config.streamed
    ]
    return out + [
        {"kind": "counted", "slice": s, "log2_length": e, "width": d or e, "ratio": r}
        for s, d in (("fixed", config.timed_width), ("growing", 0))
        for r in config.counted_ratios
        for e in config.counted_exponents
    ]


def _cell(kind: str, family: str, n: int, width: int, gamma: float, seed: int) -> dict[str, Any]:
    return {
        "kind": "accuracy",
        "slice": kind,
        "family": family,
        "length": n,
        "width": width or _growing(n),
        "gamma": gamma,
        "seed": seed,
    }


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The metrics of a point of any kind."""
    kinds = {
        "accuracy": _accuracy,
        "rank": _accuracy,
        "time": _time,
        "factor": _factor,
        "check": _check,
        "stream": _stream,
        "counted": _counted,
    }
    return kinds[point["kind"]](point, config)


def _accuracy(point: dict[str, Any], config: Config) -> dict[str, Any]:
    return map_cells.measured(point, rank=config.rank, rows=config.rows)


def _time(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """float32 seconds, as training is, of the degrees that may win and of the exact gradients."""
    length, width = point["length"], point["width"]
    problem = _in_training(length, width, config.rank, 1.0)
    # with more features than twice the tokens none can win
    degrees = [g for g in range(1, config.most_degree + 1) if math.comb(width + g, g) <= 2 * length]
    return degree_times.times(
        problem, degrees, repeats=config.repeats, max_seconds=config.max_seconds
    )


def _factor(point: dict[str, Any], config: Config) -> dict[str, Any]:
    problem = _in_training(point["length"], point["width"], config.rank, point["gamma"])
    found = factor_times.measured(problem, repeats=config.repeats, max_seconds=config.max_seconds)
    return {"score_ratio": point["gamma"] ** 2 / math.log(point["length"]), **found}


def _in_training(length: int, width: int, rank: int, gamma: float) -> ll.LoRAProblem:
    """Uniform inputs in single precision."""
    problem = boxes.problem("uniform", 0, length=length, width=width, rank=rank, gamma=gamma)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem)


def _check(point: dict[str, Any], config: Config) -> dict[str, Any]:
    problem = boxes.problem(
        point["family"],
        0,
        length=point["length"],
        width=point["width"],
        rank=min(config.rank, point["width"]),
        gamma=point["gamma"],
    )
    scan = sampled_degrees.scan(problem, highest=max(config.checked_degrees), rows=config.rows)
    found = checked_degrees.measured(problem, config.checked_degrees, targets=point["targets"])
    return {"degrees": checked_degrees.beside(scan, found)}


def _stream(point: dict[str, Any], config: Config) -> dict[str, Any]:
    length = point["length"]
    found = streaming.measured(
        length,
        point["width"],
        point["degree"],
        rank=min(config.rank, point["width"]),
        gamma=point["gamma"],
        repeats=config.repeats,
    )
    exponent = math.log(found["features"]) / math.log(length)
    ratio = point["gamma"] ** 2 / math.log(length)
    return {"score_ratio": ratio, "exponent": exponent, **found}


def _counted(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """By the bound alone: Chebyshev's remainder on [-R, R], at tolerance 1/L."""
    log_length = point["log2_length"] * math.log(2)
    gamma = point["ratio"] * math.sqrt(log_length)
    tolerance = math.exp(-log_length)
    # The normaliser has an error as well: (1 + T) / (1 - T) - 1 = 2 T / (1 - T).
    degree = degree_needed(gamma**2, tolerance / (2 + tolerance))  # 2 T / (1 - T) <= tolerance
    return {
        "gamma": gamma,
        "degree": degree,
        "exponent": width_exponent(point["width"], degree, log_length),
    }
