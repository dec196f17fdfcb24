"""Theorem F.1 against Theorems 3.1 and A.1 on the clock: time, operations and memory over L, with
fitted exponents; and, of one sequence on several devices, what these tell each other.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from pydantic import PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders.methods import BLOCKS, compiled, exact_methods, fastest
from experiments.runner.config import Fields, Tokens
from lora_limits.instruments import timing
from lora_limits.instruments.comparing import certified_share, frobenius_error
from lora_limits.instruments.counting import exchanged_bytes

VERSION = 2
POINTS = ("exact_lengths", "lengths", "cases")
DEVICES = 8  # that a sequence is split over, on a mesh that is traced and never run
ADAPT = {"partial": ("query", "value"), "full": ("query", "key", "value")}


class Config(Fields):
    """Exact gradients up to max(exact_lengths), polynomial ones up to max(lengths); float32, beta =
    1/width.

    seeds: of the problems that errors and bounds are of; the first is the one timed.
    """

    exact_lengths: tuple[Tokens, ...]
    lengths: tuple[Tokens, ...]
    cases: tuple[Literal["partial", "full"], ...] = ("partial", "full")
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gamma: PositiveFloat = 1.0
    degree: PositiveInt = 3
    seeds: PositiveInt = 3
    repeats: PositiveInt = 7
    max_seconds: PositiveFloat = 4.0


def points(config: Config) -> list[dict[str, Any]]:
    """Every (case, L): one point measures both methods, so that their ratio comes from one run."""
    lengths = sorted({*config.lengths, *config.exact_lengths})
    return [
        {"case": c, "length": n, "exact": n in config.exact_lengths}
        for c in config.cases
        for n in lengths
    ]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Seconds, counted operations and temporary bytes of both methods; beside them the error and
    what is certified of it, the largest of the seeds and "by_seed", and the bytes that devices
    would exchange.
    """
    problems = [_problem(point, config, seed) for seed in range(config.seeds)]
    problem = problems[0]
    # Beyond the longest exact length the polynomial is timed alone.
    exact = _exact(point["length"]) if point["exact"] else {}
    methods: dict[str, ll.Method] = {"polynomial": ll.Polynomial(config.degree), **exact}
    out: dict[str, dict[str, Any]] = {}
    programs = {}
    for name, method in methods.items():
        out[name], programs[name] = compiled(problem, method)
    # With the certificate, as the result carries it.
    certified = jax.jit(lambda p: ll.gradient(p, methods["polynomial"])).lower(problem).compile()
    out["certified"] = {"temporary": timing.temporary_bytes(certified)}
    calls = {n: functools.partial(run, problem) for n, run in programs.items()}
    calls["certified"] = functools.partial(certified, problem)
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    for name, time in times.items():
        out[name] |= time
    told = [certified(p) for p in problems]
    by_seed = {"bound": [certified_share(result) for result in told]}
    result: dict[str, Any] = {"methods": out, "features": told[0].rank}
    result["exchanged"] = _exchanged(problem, config)
    if exact:
        best = fastest(out, exact)
        by_seed["error"] = [_error(programs["polynomial"], programs[best], p) for p in problems]
        result |= {"best": best, **_speed_ups(out, best)}
    worst = {name: float(np.max(each)) for name, each in by_seed.items()}  # NaN if one is
    return result | {"by_seed": by_seed} | worst


def _problem(point: dict[str, Any], config: Config, seed: int) -> ll.LoRAProblem:
    return ll.random_problem(
        jax.random.key(seed),
        length=point["length"],
        width=config.width,
        rank=config.rank,
        gamma=config.gamma,
        adapt=ADAPT[point["case"]],
    )


def _exchanged(problem: ll.LoRAProblem, config: Config) -> dict[str, int]:
    """Bytes that every device tells the others, tokens split over all: in a gradient and its bounds,
    and in attention of one head and its derivative.
    """
    mesh = AbstractMesh((DEVICES,), ("tokens",), axis_types=(AxisType.Auto,))
    # Short sequences are exact unless their blocks are shorter still; bytes know nothing of blocks.
    method = ll.Polynomial(config.degree, block_size=1)

    def attention(method: ll.Method):
        def local(x):
            call = functools.partial(ll.attention, method=method, axis_name="tokens")
            return jax.vjp(call, x, x, x)[1](x)

        split = PartitionSpec("tokens")
        return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)

    length = problem.x_query.shape[0]
    x = jax.ShapeDtypeStruct((length, 1, config.width), problem.dtype)
    return {
        "gradient": exchanged_bytes(lambda p: ll.sharded_gradient(p, method, mesh), problem),
        "attention": exchanged_bytes(attention(method), x),
        "exact attention": exchanged_bytes(attention(ll.Exact()), x),
    }


def _exact(length: int) -> dict[str, ll.Exact]:
    """From 2^15 on the best block no longer changes, and each run takes seconds: one is left."""
    return exact_methods(length, BLOCKS if length <= 16384 else (1024,), dense_up_to=4096)


def _speed_ups(out: dict[str, dict[str, Any]], best: str) -> dict[str, float]:
    """Over the best exact contender, without the certificate and with it."""
    return {
        "speed_up": timing.ratio(out[best], out["polynomial"])[0],
        "speed_up_certified": timing.ratio(out[best], out["certified"])[0],
    }


def _error(ours: Any, exact: Any, problem: ll.LoRAProblem) -> float:
    """The largest of the arrays' relative errors."""
    pairs = zip(jax.tree.leaves(ours(problem)), jax.tree.leaves(exact(problem)), strict=True)
    return float(np.max([frobenius_error(got, want) for got, want in pairs]))
