"""The polynomial gradient on one accelerator against the exact gradients that its own kernels give.

One point is one length: every contender that the device can run, timed by turns, its error beside
its time. What it cannot run, or not within the limits, keeps its place in the row with the reason
why. Errors are relative: against the exact gradient where one fits the time (in float64 on the host
up to 4096 tokens, beyond that tiled in float32 on the device); beyond that the polynomial's are
estimated from sampled queries, in max norm.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import kernels, truth
from experiments.contenders.kernels import Contender
from experiments.contenders.truth import Reference
from experiments.runner.config import Fields, Tokens
from lora_limits.instruments import timing

VERSION = 1
POINTS = ("lengths",)
# No exact gradient of a longer input is tried before one of this length has been timed.
PILOT = 16384
SAMPLED = 128  # queries behind an estimated error
TOLD = ("family", "dtype", "precision", "features")  # of every contender, run or not


class Config(Fields):
    """blocks: tokens to a block of the polynomial's sweeps; 0 leaves it to the library.

    tiles: of the library's exact gradient; the last is the reference beyond 4096 tokens. An exact
    gradient runs where it takes most_seconds or less, anything where it takes most_bytes of working
    memory or less.
    """

    lengths: tuple[Tokens, ...]
    degrees: tuple[PositiveInt, ...] = (2, 3)
    blocks: tuple[NonNegativeInt, ...] = (0,)
    tiles: tuple[PositiveInt, ...] = (1024, 4096)
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gamma: PositiveFloat = 1.0
    seed: int = 0
    repeats: PositiveInt = 7
    max_seconds: PositiveFloat = 3.0
    most_seconds: PositiveFloat = 3.0
    most_bytes: PositiveFloat = 5e10

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def points(config: Config) -> list[dict[str, Any]]:
    """Every length, on the device that is there: on another device it is another point."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        gone = "no accelerator found: Pallas, cuDNN and TF32 are left out"
        left = "XLA in float32, the tiled exact gradient and ours run on this CPU"
        print(f"{gone}; {left}", file=sys.stderr)
    return [{"length": n, "device": device.device_kind} for n in sorted(set(config.lengths))]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Time, memory, precision and errors of every contender by name, or why it was left out."""
    problem = make_problem(point["length"], config)
    true, source = reference(problem, config)
    methods: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, contender in contenders(config).items():
        methods[name] = {quality: getattr(contender, quality) for quality in TOLD}
        reason = too_long(name, point["length"], config) if contender.family == "exact" else None
        if reason:
            methods[name]["left_out"] = reason
            continue
        outcome, program, value = kernels.attempt(contender, problem, config.most_bytes)
        methods[name] |= outcome
        if program is not None:
            calls[name] = functools.partial(program, problem)
            methods[name] |= judge(value, true) if name != source else {}
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    for name, time in times.items():
        methods[name] |= time
    if true is None:
        for name, error in estimates(problem, config).items():
            methods[name]["estimated_error"] = error
            methods[f"{name}, certified"]["estimated_error"] = error
    # Which device it was is part of the row: rows of several may lie in one folder.
    device = {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}
    return device | {"reference": source, "methods": methods}


def make_problem(length: int, config: Config) -> ll.LoRAProblem:
    """Random self-attention with query and value adapters, beta = 1/width."""
    key = jax.random.key(config.seed)
    return ll.random_problem(
        key, length=length, width=config.width, rank=config.rank, gamma=config.gamma
    )


def polynomials(config: Config) -> dict[str, ll.Polynomial]:
    """Polynomial methods by name."""
    out = {}
    for degree in config.degrees:
        for block in config.blocks:
            # A block is named where there is a choice of them.
            suffix = f", block {block or 'auto'}" if len(config.blocks) > 1 else ""
            out[f"degree {degree}{suffix}"] = ll.Polynomial(degree, block_size=block or None)
    return out


def contenders(config: Config) -> dict[str, Contender]:
    """Every contender by name."""
    return kernels.contenders(config.tiles, polynomials(config), config.width)


@functools.cache
def pilot_seconds(name: str, config: Config) -> float:
    """Seconds that a contender takes for PILOT tokens; 0 if it cannot be run, so that every length
    says why.
    """
    problem = make_problem(PILOT, config)
    program = kernels.attempt(contenders(config)[name], problem, config.most_bytes)[1]
    if program is None:
        return 0.0
    share = config.max_seconds / 4
    return timing.median_time(program, problem, repeats=3, max_seconds=share)["seconds"]


def too_long(name: str, length: int, config: Config) -> str | None:
    """Why an exact contender is not even tried at this length, if so: it would take more than
    most_seconds.
    """
    # Exact gradients cost L^2, so that a short run tells how long a long one takes.
    seconds = pilot_seconds(name, config) * (length / PILOT) ** 2 if length > PILOT else 0.0
    return f"would take about {seconds:.3g} s" if seconds > config.most_seconds else None


def reference(problem: ll.LoRAProblem, config: Config) -> tuple[Reference | None, str | None]:
    """The exact gradient, where one is within the limits, and whose: float64 on the host, or a
    contender's own.
    """
    length = problem.target.shape[0]
    tile = config.tiles[-1]
    if length <= truth.FLOAT64_LENGTH:
        # On the host, for accelerators are slow in float64 if they have it at all.
        with jax.default_device(jax.devices("cpu")[0]):
            return truth.reference(problem), "float64"
    if too_long(f"tiled {tile}", length, config):
        return None, None
    gradient = jax.jit(lambda p: ll.gradient(p, ll.Exact(tile)).gradient)(problem)
    return truth.of_gradient(gradient), f"tiled {tile}"


def judge(value: Any, true: Reference | None) -> dict[str, Any]:
    """Errors of a gradient and, where it comes with one, its certified bound over the largest
    entry.
    """
    if true is None:
        return {}
    gradient, bound = value
    out = truth.errors(gradient, true)
    return out if bound is None else out | {"bound": truth.relative_bound(bound, true)}


def estimates(problem: ll.LoRAProblem, config: Config) -> dict[str, float]:
    """By polynomial that runs: the upper end of its estimated max-norm error over the largest
    entry, worst array.
    """

    def run(problem: ll.LoRAProblem, method: ll.Polynomial) -> Any:
        result = ll.gradient(problem, method, rows=SAMPLED, key=jax.random.key(config.seed + 1))
        assert result.estimate is not None
        worst = []
        for name, adapter in result.gradient.items():
            estimate = result.estimate[name]
            worst.append(estimate.a.high / jnp.abs(adapter.a).max())
            worst.append(estimate.b.high / jnp.abs(adapter.b).max())
        return jnp.stack(worst).max()

    out = {}
    for name, method in polynomials(config).items():
        contender = kernels.Contender("estimate", functools.partial(run, method=method))
        # An estimate may fail as a contender may, for want of memory.
        value = kernels.attempt(contender, problem, config.most_bytes)[2]
        out |= {name: float(value)} if value is not None else {}
    return out
