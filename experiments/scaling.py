"""Theorem F.1 against Theorems 3.1 and A.1 on the clock: time, operations and memory over L, with
fitted exponents.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from experiments.runner.config import Fields

VERSION = 1
SHARED = ("width", "rank", "gamma", "degree", "seed", "repeats", "max_seconds")
ADAPT = {"partial": ("query", "value"), "full": ("query", "key", "value")}
BLOCKS = (512, 1024, 2048)


class Config(Fields):
    """Exact gradients up to max(exact_lengths), polynomial ones up to max(lengths); float32, beta =
    1/width.
    """

    exact_lengths: tuple[PositiveInt, ...]
    lengths: tuple[PositiveInt, ...]
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
    """Seconds, counted operations and temporary bytes of both methods, and the error beside
    them.
    """
    import jax
    import numpy as np

    import lora_limits as ll
    from lora_limits.instruments import timing
    from lora_limits.instruments.counting import count_operations

    problem = ll.random_problem(
        jax.random.key(config.seed),
        length=point["length"],
        width=config.width,
        rank=config.rank,
        gamma=config.gamma,
        adapt=ADAPT[point["case"]],
    )
    methods: dict[str, ll.Method] = {"polynomial": ll.Polynomial(config.degree)}
    if point["exact"]:
        # past 2^15 the best block no longer changes, and each exact run takes seconds
        tried = BLOCKS if point["length"] <= 16384 else (1024,)
        blocks = [b for b in tried if b <= point["length"]] or [point["length"]]
        methods |= {f"exact {b}": ll.Exact(b) for b in blocks}
        if point["length"] <= 4096:
            methods["exact dense"] = ll.Exact()
    out = {}
    calls = {}
    values = {}
    for name, method in methods.items():
        run = jax.jit(lambda p, m=method: ll.gradient(p, m).gradient)
        compiled, seconds = timing.compile_seconds(run, problem)
        counted = count_operations(lambda p, m=method: ll.gradient(p, m).gradient, problem)["flops"]
        out[name] = {
            "compile": seconds,
            "temporary": timing.temporary_bytes(compiled),
            "operations": counted,
        }
        calls[name] = lambda c=compiled: c(problem)
        values[name] = compiled(problem)
    # with the certificate, as the result carries it
    certified = (
        jax.jit(lambda p: ll.gradient(p, ll.Polynomial(config.degree))).lower(problem).compile()
    )
    calls["certified"] = lambda: certified(problem)
    out["certified"] = {"temporary": timing.temporary_bytes(certified)}
    for name, time in timing.interleaved(
        calls, repeats=config.repeats, max_seconds=config.max_seconds
    ).items():
        out[name] |= time
    exact = [n for n in methods if n != "polynomial"]
    result: dict[str, Any] = {"methods": out, "features": certified(problem).rank}
    if exact:
        best = min(exact, key=lambda n: out[n]["seconds"])
        pairs = zip(
            jax.tree.leaves(values["polynomial"]), jax.tree.leaves(values[best]), strict=True
        )
        result["best"] = best
        result["speed_up"] = out[best]["seconds"] / out["polynomial"]["seconds"]
        result["speed_up_certified"] = out[best]["seconds"] / out["certified"]["seconds"]
        result["error"] = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    return result
