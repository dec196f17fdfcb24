"""What a guarantee costs: the certified bound of every gradient array beside its true error, over
families of inputs.

True errors are against the dense exact gradient, in float64. An error at the level of that
gradient's own rounding says nothing of its bound: its guard, GUARD times that level, tells which
they are, and they are counted.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.problems import families
from experiments.runner.config import Fields, Tokens
from lora_limits.instruments.comparing import named
from lora_limits.instruments.compiling import quick_jit

VERSION = 1
POINTS = ("kinds", "shapes", "taylor", "chebyshev", "fitted", "most_features")
X64 = True
GUARD = 100.0


class Config(Fields):
    """Problems of every kind in every shape [length, width], all three projections adapted.

    taylor, chebyshev, fitted: degrees of each series, of which those of at most `most_features`
    features are run. instances: problems a point, twice as many for self-attention; their largest
    centred score is drawn log-uniformly from `lowest` to `highest`.
    """

    kinds: tuple[families.Kind, ...]
    shapes: tuple[tuple[Tokens, PositiveInt], ...]
    taylor: tuple[PositiveInt, ...]
    chebyshev: tuple[PositiveInt, ...]
    fitted: tuple[PositiveInt, ...]
    most_features: PositiveInt = 3003
    instances: PositiveInt
    rank: PositiveInt = 2
    lowest: PositiveFloat = 0.2
    highest: PositiveFloat = 8.0
    seed: int = Field(default=0, ge=0)


def points(config: Config) -> list[dict[str, Any]]:
    """A shape and a series at all its degrees, kind by kind: these run the same compiled
    functions.
    """
    out = []
    for length, width in config.shapes:
        for series in ("taylor", "chebyshev", "fitted"):
            every = getattr(config, series)
            degrees = [g for g in every if math.comb(width + g, g) <= config.most_features]
            cell = {"length": length, "width": width, "series": series, "degrees": degrees}
            out += [{"kind": kind} | cell for kind in config.kinds if degrees]
    return out


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Errors and bounds {array: [[one a degree] an instance]}, guards {array: [one an instance]},
    reach of the scores.

    Errors, bounds and guards are relative to the largest entry of the instance's gradient. Counts
    over instances, arrays and degrees: checked; refused, infinite bounds; rounding, errors within
    their guard; violations, errors above both guard and bound.
    """
    count = config.instances * (2 if point["kind"] == "self-attention" else 1)
    instances = [_instance(point, config, number) for number in range(count)]
    names = instances[0]["arrays"]
    error, bound, guard = (
        np.stack([instance[what] for instance in instances]) for what in ("error", "bound", "guard")
    )
    # Said so that NaN counts as an error, not as rounding.
    clear = ~(error <= guard[..., None])
    return {
        "reach": _short([instance["reach"] for instance in instances]),
        "errors": {name: _short(error[:, i]) for i, name in enumerate(names)},
        "bounds": {name: _short(bound[:, i]) for i, name in enumerate(names)},
        "guards": {name: _short(guard[:, i]) for i, name in enumerate(names)},
        "checked": error.size,
        "refused": int(np.isinf(bound).sum()),
        "rounding": int((~clear).sum()),
        "violations": int((clear & ~(error <= bound)).sum()),
    }


def _instance(point: dict[str, Any], config: Config, number: int) -> dict[str, Any]:
    """One problem: errors and bounds (arrays, degrees), guards (arrays,)."""
    length = point["length"]
    width = point["width"]
    # The same problems for every series.
    kind = families.KINDS.index(point["kind"])
    rng = np.random.default_rng([config.seed, kind, length, width, number])
    # Log-uniform, for what a polynomial needs grows with the reach by factors.
    reach = math.exp(rng.uniform(math.log(config.lowest), math.log(config.highest)))
    problem = families.problem(
        rng, point["kind"], length=length, width=width, rank=config.rank, reach=reach
    )
    exact = named(_gradient()(problem, method=ll.Exact()).gradient)
    sizes = np.array([np.abs(x).max() for x in exact.values()])
    error, bound = np.empty((2, len(exact), len(point["degrees"])))
    for at, degree in enumerate(point["degrees"]):
        result = _gradient()(problem, method=ll.Polynomial(degree, point["series"]))
        got = named(result.gradient)
        error[:, at] = [np.abs(x - exact[name]).max() for name, x in got.items()]
        bound[:, at] = list(named(result.bound).values())
    # Rounding errors of the reference add up like a random walk over L terms.
    guard = GUARD * math.sqrt(length) * np.finfo(float).eps * sizes
    scaled = {"error": error, "bound": bound, "guard": guard}
    relative = {name: x / sizes.max() for name, x in scaled.items()}
    return {"arrays": list(exact), "reach": reach, **relative}


@functools.cache
def _gradient() -> Any:
    """ll.gradient, compiled once for each shape and method."""
    return quick_jit(ll.gradient, static_argnames="method")


def _short(values: Any) -> Any:
    """Nested lists of numbers, to three digits."""
    return [_short(x) for x in values] if np.ndim(values) else float(f"{values:.2e}")
