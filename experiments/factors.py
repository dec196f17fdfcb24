"""Factors of f on real heads: gradient error against width and against time, and what each says of
its own error.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import PositiveFloat, PositiveInt, field_validator

from experiments.runner.config import Fields

VERSION = 2
SHARED = ("inputs", "noise", "rank", "seed", "repeats", "max_seconds", "widths", "timed_widths")
METHODS = ("svd", "skeleton", "sparse", "monomials", "random", "nystrom")
DENSE = 2048  # the longest sequence whose singular value decomposition is computed
TILES = (512, 1024, 2048)


class Config(Fields):
    """Widths of the factors on `most` heads of each layer at `lengths` tokens; times at `timed`
    tokens.

    noise: of the target, beside the head's output: errors are relative to the gradient, which grows
    with it.
    inputs: a file of longer inputs made by experiments/data/make_minilm_heads.py; "" for the 512
    tokens embedded.
    Times need no text: they are taken on a head whose tokens are repeated with noise. sparse: half
    of its width is entries.
    """

    inputs: str = ""
    noise: PositiveFloat = 1.0
    lengths: tuple[PositiveInt, ...] = (512,)
    most: PositiveInt = 3
    widths: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256)
    methods: tuple[str, ...] = METHODS
    timed: tuple[PositiveInt, ...] = (2048, 4096, 8192)
    timed_widths: tuple[PositiveInt, ...] = (64, 256)
    rank: PositiveInt = 4
    seed: int = 0
    repeats: PositiveInt = 3
    max_seconds: PositiveFloat = 6.0

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(value) - set(METHODS)):
            raise ValueError(f"got {unknown}, expected names among {list(METHODS)}")
        return value


def points(config: Config) -> list[dict[str, Any]]:
    """Errors of one method on one head at one length; then times at one length."""
    from experiments.problems import minilm

    path = _path(config)
    chosen = []
    for layer in dict.fromkeys(layer for layer, _ in minilm.heads(path)):
        own = [pair for pair in minilm.heads(path) if pair[0] == layer]
        places = sorted(
            {
                round(i * (len(own) - 1) / max(config.most - 1, 1))
                for i in range(min(config.most, len(own)))
            }
        )
        chosen += [own[place] for place in places]
    # method before head: a program is compiled once for all heads
    out: list[dict[str, Any]] = [
        {"kind": "error", "method": method, "layer": layer, "head": head, "length": length}
        for length in config.lengths
        for method in config.methods
        if method != "svd" or length <= DENSE
        for layer, head in chosen
    ]
    return out + [{"kind": "time", "length": length} for length in config.timed]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """By width: relative Frobenius errors by array, their estimates, failure; or times and errors
    at one length.
    """
    return _times(point, config) if point["kind"] == "time" else _errors(point, config)


def _path(config: Config):
    from pathlib import Path

    from experiments import Refused
    from experiments.problems import minilm

    if config.inputs and not Path(config.inputs).is_file():
        raise Refused(
            f"inputs: got {config.inputs!r}, expected a file made by experiments/data/make_minilm_heads.py"
        )
    return Path(config.inputs) if config.inputs else minilm.PATH


def make(name: str, width: int):
    """The method of that name and width."""
    import lora_limits as ll

    if name == "sparse":
        return ll.SparseLowRank(max(width // 2, 1), max(width // 2, 1))
    kinds = {
        "svd": ll.Svd,
        "skeleton": ll.Skeleton,
        "monomials": ll.AdaptedMonomials,
        "random": ll.RandomFeatures,
        "nystrom": ll.Nystrom,
    }
    return kinds[name](width)


@functools.cache
def _quick(name: str, width: int):
    import lora_limits as ll
    from lora_limits.instruments.compiling import quick_jit

    method = make(name, width)

    def run(problem):
        result = ll.gradient(problem, method)
        return result.gradient, result.relative_error, result.failed

    return quick_jit(run)


@functools.cache
def _exact():
    import lora_limits as ll
    from lora_limits.instruments.compiling import quick_jit

    return quick_jit(lambda problem: ll.gradient(problem, ll.Exact(min(TILES))).gradient)


def _errors(point: dict[str, Any], config: Config) -> dict[str, Any]:
    import numpy as np

    from experiments.contenders import truth
    from experiments.problems import minilm

    place = point["layer"], point["head"]
    length = point["length"]
    path = _path(config)
    problem = minilm.problem(
        *place, length=length, rank=config.rank, seed=config.seed, noise=config.noise, path=path
    )
    true = truth.Reference(truth.named(_exact()(problem)), np.zeros(0), np.zeros(0))
    widths = []
    for width in config.widths:
        gradient, estimated, failed = _quick(point["method"], width)(problem)
        found = truth.errors(gradient, true)
        said = {name: float(x) for name, x in truth.named(estimated).items()}
        widths.append(
            {"width": width, **found, "estimated": max(said.values()), "failed": bool(failed)}
        )
    return {"score_range": minilm.score_range(*place, path=path), "widths": widths}


def stretched(problem, length: int, seed: int = 0):
    """The problem with its tokens repeated up to `length`, with noise of a twentieth of the spread
    of each column.
    """
    import dataclasses

    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(seed)

    def longer(x):
        x = np.asarray(x)
        out = np.resize(x, (length, x.shape[1]))
        return jnp.asarray(
            out + 0.05 * x.std(0) * random.standard_normal(out.shape).astype(x.dtype), x.dtype
        )

    x = longer(problem.x_query)
    return dataclasses.replace(
        problem, x_query=x, x_key=x, x_value=x, target=longer(problem.target)
    )


def _times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    import jax
    import numpy as np

    import lora_limits as ll
    from experiments.contenders import truth
    from experiments.problems import minilm
    from lora_limits.instruments import timing
    from lora_limits.instruments.counting import count_operations

    head = minilm.problem(
        *minilm.heads()[11], rank=config.rank, seed=config.seed, noise=config.noise
    )
    problem = stretched(head, point["length"])
    methods = {f"exact {b}": ll.Exact(b) for b in TILES if b <= point["length"]} or {
        "exact": ll.Exact(point["length"])
    }
    methods |= {
        f"{name} {k}": make(name, k) for name in ("skeleton", "sparse") for k in config.timed_widths
    }
    out: dict[str, Any] = {}
    programs = {}
    for name, method in methods.items():
        run = jax.jit(lambda p, method=method: ll.gradient(p, method).gradient)
        programs[name], seconds = timing.compile_seconds(run, problem)
        operations = count_operations(
            lambda p, method=method: ll.gradient(p, method).gradient, problem
        )["flops"]
        out[name] = {
            "compile": seconds,
            "temporary": timing.temporary_bytes(programs[name]),
            "operations": operations,
        }
    calls = {name: functools.partial(program, problem) for name, program in programs.items()}
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    exact = min(
        (name for name in out if name.startswith("exact")), key=lambda name: times[name]["seconds"]
    )
    true = truth.Reference(truth.named(programs[exact](problem)), np.zeros(0), np.zeros(0))
    for name in out:
        out[name] |= times[name]
        if not name.startswith("exact"):
            out[name] |= truth.errors(programs[name](problem), true)
    return {"best": exact, "contenders": out}
