"""What the two promises of an approximate gradient say at length, and what attacks make of the
certified one.

A point is a plain problem, of which the true error stands beside both promises, or a part of an
attack, of which the problems are counted and the largest error over bound is kept.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.attacks import ATTACKS
from experiments.runner.config import Fields
from lora_limits.instruments.comparing import named
from lora_limits.instruments.compiling import quick_jit

VERSION = 1
POINTS = ("lengths", "dtypes", "seeds", "families", "climbs", "long_sequences", "directed")
X64 = True
# The field that says into how many parts each attack is cut.
PARTS = {
    "families": "families",
    "hill climbing": "climbs",
    "long sequences": "long_sequences",
    "directed": "directed",
}
Number = Literal["float64", "float32"]


class Config(Fields):
    """random_problem at every length, precision and seed, at every degree; query and value adapted,
    beta = 1/width.

    rows, delta: of the promise by sampling. families, climbs, long_sequences, directed: parts of
    each attack in each precision, a part of `problems` problems (of families), one climb,
    `sequences` long sequences, and `cases` problems of each directed family.
    """

    lengths: tuple[PositiveInt, ...]
    degrees: tuple[PositiveInt, ...]
    dtypes: tuple[Number, ...] = ("float64", "float32")
    seeds: tuple[int, ...]
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gamma: PositiveFloat = 1.0
    rows: PositiveInt = 1024
    delta: PositiveFloat = 1e-6
    families: int = Field(ge=0)
    climbs: int = Field(ge=0)
    long_sequences: int = Field(ge=0)
    directed: int = Field(ge=0)
    problems: PositiveInt = 2000
    batch: PositiveInt = 500
    generations: PositiveInt = 40
    sequences: PositiveInt = 50
    longest: PositiveInt = 20
    cases: PositiveInt = 200


def points(config: Config) -> list[dict[str, Any]]:
    """The plain problems, lengths upwards, then the parts of the attacks."""
    plain = [
        {"length": length, "dtype": dtype, "seed": seed}
        for length in config.lengths
        for dtype in config.dtypes
        for seed in config.seeds
    ]
    return plain + [
        {"attack": attack, "dtype": dtype, "part": part}
        for attack, field in PARTS.items()
        for dtype in config.dtypes
        for part in range(getattr(config, field))
    ]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Of a plain problem {"error", "certified", "confident"}: {array: [one a degree]}, over the
    array's largest entry; of an attack {"families": {name: {"problems", "finite", "worst",
    "violations"}}}.
    """
    if "attack" in point:
        return {"families": _attacked(point, config)}
    problem = ll.random_problem(
        jax.random.key(point["seed"]),
        length=point["length"],
        width=config.width,
        rank=config.rank,
        gamma=config.gamma,
    )
    problem = jax.tree.map(lambda x: jnp.asarray(x, point["dtype"]), problem)
    # The library's coin, which knows nothing of the problem.
    options = {"rows": config.rows, "key": jax.random.key(1_000_003 + point["seed"])}
    wide = jax.tree.map(lambda x: jnp.asarray(x, "float64"), problem)
    exact = named(_gradient()(wide, method=ll.Exact(min(1024, point["length"]))).gradient)
    sizes = {name: np.abs(x).max() for name, x in exact.items()}
    out: dict[str, dict[str, list[float]]] = {}
    for degree in config.degrees:
        method = ll.Polynomial(degree)
        result = _gradient()(problem, method=method, delta=config.delta, **options)
        told = {
            "error": {n: np.abs(x - exact[n]).max() for n, x in named(result.gradient).items()},
            "certified": named(result.bound),
            "confident": named(result.confident),
        }
        for what, values in told.items():
            for name, x in values.items():
                relative = float(f"{float(x) / sizes[name]:.3e}")
                out.setdefault(what, {}).setdefault(name, []).append(relative)
    return out


def _attacked(point: dict[str, Any], config: Config) -> dict[str, Any]:
    attack = ATTACKS[point["attack"]]
    options: dict[str, Any] = {
        "families": {"count": config.problems, "batch": config.batch},
        "hill climbing": {"count": 1, "generations": config.generations},
        "long sequences": {"count": config.sequences, "longest": config.longest},
        "directed": {"count": config.cases},
    }[point["attack"]]
    # A number of its own for every part in every precision.
    seed = 2 * point["part"] + (point["dtype"] == "float32")
    tallies = attack(seed=seed, dtype=np.dtype(point["dtype"]).type, **options)
    return {
        name: {
            "problems": tally.problems,
            "finite": tally.finite,
            "worst": float(f"{tally.worst:.3e}"),
            "violations": len(tally.broken),
        }
        for name, tally in tallies.items()
    }


@functools.cache
def _gradient() -> Any:
    """ll.gradient, compiled once for each shape and method."""
    return quick_jit(ll.gradient, static_argnames=("method", "rows", "delta"))
