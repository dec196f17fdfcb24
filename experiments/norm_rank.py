"""What the norm bound and the LoRA rank do: errors of every degree over Gamma, and Gamma and k* over
(adapter size, r); and how large adapters of these ranks are after training.

Errors are those of contenders/sampled_degrees.py: per array, expected over the target.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import sampled_degrees
from experiments.contenders.needed_degrees import features, needed
from experiments.problems import boxes
from experiments.runner.config import Fields, Tokens
from experiments.training import adapter_sizes
from lora_limits.instruments.compiling import quick_jit
from lora_limits.nn.lora import LoRA
from lora_limits.problem import NAMES

VERSION = 2
POINTS = ("gammas", "sizes", "ranks", "conventions", "seeds", "rates", "steps")
PLACES = ("cache",)
X64 = True


class Config(Fields):
    """Degrees panel: gammas x seeds. Adapter panel: sizes (standard deviation of the entries of A
    and B) x ranks x conventions x seeds, on inputs of width `inputs`. rows: queries drawn. Trained
    adapters: rates of Adam x ranks x conventions x seeds, `steps` each; cache: where their base is
    kept.
    """

    length: Tokens
    width: PositiveInt = 8
    inputs: PositiveInt = 64
    rank: PositiveInt = 4
    gammas: tuple[PositiveFloat, ...]
    highest: PositiveInt = 12
    sizes: tuple[PositiveFloat, ...]
    ranks: tuple[PositiveInt, ...]
    conventions: tuple[Literal["alpha/r", "alpha/sqrt(r)"], ...] = ("alpha/r", "alpha/sqrt(r)")
    alpha: PositiveFloat = 16.0
    base_gamma: PositiveFloat = 0.5
    tolerance: PositiveFloat = 0.01
    seeds: tuple[int, ...] = (0,)
    rows: PositiveInt = 128
    rates: tuple[PositiveFloat, ...] = ()
    steps: PositiveInt = 200
    cache: str = Field(default="results/bases", min_length=1)


def points(config: Config) -> list[dict[str, Any]]:
    """The degrees panel, the adapter panel, trained adapters."""
    out: list[dict[str, Any]] = [
        {"kind": "degrees", "gamma": g, "seed": s} for s in config.seeds for g in config.gammas
    ]
    out += [
        {"kind": "adapter", "convention": c, "rank": r, "size": size, "seed": s}
        for c in config.conventions
        for r in config.ranks
        for size in config.sizes
        for s in config.seeds
    ]
    named = {"kind": "trained", "steps": config.steps}
    return out + [
        named | {"convention": c, "rank": r, "rate": rate, "seed": s}
        for rate in config.rates
        for c in config.conventions
        for r in config.ranks
        for s in config.seeds
    ]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Errors of every degree at one Gamma; norms and k* of one adapter; or the size of one that was
    trained.
    """
    kinds = {"degrees": _degrees, "adapter": _adapter, "trained": _trained}
    return kinds[point["kind"]](point, config)


def _scan(problem: ll.LoRAProblem, seed: int, config: Config) -> sampled_degrees.Scan:
    key = jax.random.key(seed)
    return sampled_degrees.scan(problem, highest=config.highest, rows=config.rows, key=key)


def _degrees(point: dict[str, Any], config: Config) -> dict[str, Any]:
    problem = boxes.problem(
        "uniform",
        point["seed"],
        length=config.length,
        width=config.width,
        rank=config.rank,
        gamma=point["gamma"],
    )
    worst, spread = _scan(problem, point["seed"], config).worst()
    return {
        "errors": worst.tolist(),
        "spread": spread.tolist(),
        "features": [math.comb(config.width + g, g) for g in range(len(worst))],
    }


def _base(rng: np.random.Generator, config: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(tokens, frozen weights): max |X W| is base_gamma for queries and keys."""
    x = rng.uniform(-1, 1, (config.length, config.inputs))
    shape = (config.inputs, config.width)
    weights = {n: rng.normal(size=shape) / config.inputs**0.5 for n in ("query", "key", "value")}
    for name in ("query", "key"):
        weights[name] *= config.base_gamma / np.abs(x @ weights[name]).max()
    return x, weights


def _adapter(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms of the adapted problem, how large the update is beside the weight, and what a tolerance
    needs.
    """
    rng = np.random.default_rng(point["seed"])
    x, weights = _base(rng, config)
    r, d = point["rank"], config.width
    # Draws of their own for every rank, so that no field beside the rank changes them.
    rng = np.random.default_rng([point["seed"], r])
    a = point["size"] * rng.normal(size=(r, d))
    b = point["size"] * rng.normal(size=(config.inputs, r))
    scale = config.alpha / (r if point["convention"] == "alpha/r" else math.sqrt(r))
    tokens = jnp.asarray(x)
    problem = ll.LoRAProblem(
        tokens,
        tokens,
        tokens,
        jnp.zeros((config.length, d)),
        weights=ll.AttentionWeights(**{n: jnp.asarray(w) for n, w in weights.items()}),
        adapters={"query": ll.Adapter(jnp.asarray(a), jnp.asarray(b))},
        scale=scale,
        beta=1 / d,
    )
    report = quick_jit(ll.norm_report)(problem)
    worst, _ = _scan(problem, point["seed"], config).worst()
    share = scale * np.linalg.norm(b @ a) / np.linalg.norm(weights["query"])
    need = needed(list(worst), config.tolerance, width=d, length=config.length)
    return {
        "gamma": float(report.gamma),
        "gamma_ratio": float(report.gamma_ratio),
        "update": float(report.query_update),
        "score_bound": float(report.score_bound),
        "share": float(share),
        **need,
        "interpolated": None if need["real"] is None else features(d, need["real"]),
    }


def _trained(point: dict[str, Any], config: Config) -> dict[str, Any]:
    lora = LoRA(point["rank"], config.alpha, point["convention"], NAMES)
    how = {"steps": point["steps"], "rate": point["rate"], "seed": point["seed"]}
    return adapter_sizes.trained(lora, **how, cache=config.cache)
