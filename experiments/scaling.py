"""Theorem F.1 against Theorems 3.1 and A.1 on the clock: time, operations and memory over L, with
fitted exponents; and, of one sequence on several devices, what these tell each other.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from pydantic import PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders.methods import BLOCKS, compiled, exact_methods, fastest
from experiments.runner.config import Fields, Tokens
from lora_limits.instruments import timing
from lora_limits.instruments.comparing import certified_share, frobenius_error
from lora_limits.instruments.counting import exchanged_bytes

VERSION = 1
POINTS = ("exact_lengths", "lengths", "cases")
DEVICES = 8  # that a sequence is split over, on a mesh that is traced and never run
ADAPT = {"partial": ("query", "value"), "full": ("query", "key", "value")}


class Config(Fields):
    """Exact gradients up to max(exact_lengths), polynomial ones up to max(lengths); float32, beta =
    1/width.
    """

    exact_lengths: tuple[Tokens, ...]
    lengths: tuple[Tokens, ...]
    cases: tuple[Literal["partial", "full"], ...] = ("partial", "full")
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gamma: PositiveFloat = 1.0
    degree: PositiveInt = 3
    seed: int = 0
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
    what is certified of it, and the bytes that devices would exchange.
    """
    problem = ll.random_problem(
        jax.random.key(config.seed),
        length=point["length"],
        width=config.width,
        rank=config.rank,
        gamma=config.gamma,
        adapt=ADAPT[point["case"]],
    )
    # Beyond the longest exact length the polynomial is timed alone.
    exact = _exact(point["length"]) if point["exact"] else {}
    methods: dict[str, ll.Method] = {"polynomial": ll.Polynomial(config.degree), **exact}
    out: dict[str, dict[str, Any]] = {}
    calls = {}
    values = {}
    for name, method in methods.items():
        out[name], program = compiled(problem, method)
        calls[name] = functools.partial(program, problem)
        # A run before the timing gives the values that errors are of.
        values[name] = program(problem)
    # With the certificate, as the result carries it.
    certified = jax.jit(lambda p: ll.gradient(p, methods["polynomial"])).lower(problem).compile()
    calls["certified"] = functools.partial(certified, problem)
    out["certified"] = {"temporary": timing.temporary_bytes(certified)}
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    for name, time in times.items():
        out[name] |= time
    told = certified(problem)
    result = {"methods": out, "features": told.rank, "bound": certified_share(told)}
    result["exchanged"] = _exchanged(problem, config)
    return result | (_against(fastest(out, exact), out, values) if exact else {})


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


def _against(best: str, out: dict[str, dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    """Speed-ups over the best exact contender, and the error against its gradient."""
    pairs = zip(jax.tree.leaves(values["polynomial"]), jax.tree.leaves(values[best]), strict=True)
    least = out[best]["seconds"]
    return {
        "best": best,
        "speed_up": least / out["polynomial"]["seconds"],
        "speed_up_certified": least / out["certified"]["seconds"],
        "error": max(frobenius_error(got, want) for got, want in pairs),
    }
