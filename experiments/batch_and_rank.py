"""Norm bound, rank and mini-batch: when the error of an approximate gradient drowns in the noise of
its batch.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
from flax import nnx
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from experiments.runner.config import Fields
from experiments.training import bases, tasks
from lora_limits.instruments.compiling import quick_jit
from lora_limits.nn import per_layer
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import batches, gradient_noise, loop
from lora_limits.training.loop import Recipe

VERSION = 1
POINTS = ("ranks", "norms", "seeds")
PLACES = ("cache",)
SHRINK = 0.35


class Config(Fields):
    """Adapters on Q, K and V of a classifier with heads of width 4; alpha = 2 r, so that the scale
    is 2 at every rank.

    Runs: each of ranks, batches and norms in turn, the others at their middle one and the first of
    norms, exact and at every degree. norms: queries and keys "normalised", so that no score passes
    sqrt(4) = 2; or free, from a base whose W*_Q and W*_K were "shrunk" by 0.35, so that R starts
    near ln(L) / 2, or are as they were. sample: examples behind the moments of the gradient. cache:
    where pretrained bases are kept.
    """

    degrees: tuple[NonNegativeInt, ...] = Field(min_length=1)
    ranks: tuple[PositiveInt, ...] = Field(min_length=1)
    batches: tuple[PositiveInt, ...] = Field(min_length=1)
    norms: tuple[Literal["normalised", "shrunk", "free"], ...] = Field(min_length=1)
    seeds: PositiveInt
    task: Literal["digits", "prose_or_code", "which_module"] = "digits"
    length: PositiveInt = 64
    pretrain_steps: PositiveInt = 400
    steps: PositiveInt = 100
    rate: PositiveFloat = 1e-2
    tests: PositiveInt = 512
    sample: PositiveInt = 128
    layers: PositiveInt = 1
    cache: str = Field(default="results/bases", min_length=1)

    @model_validator(mode="after")
    def _fitting(self):
        tasks.check_length(self.task, self.length)
        return self


def middle(values: tuple[Any, ...]) -> Any:
    """The value that stands while others vary."""
    return values[len(values) // 2]


def points(config: Config) -> list[dict[str, Any]]:
    """Moments of the gradient for every (norms, rank, seed) of the runs, then the runs, seeds last:
    alike to XLA.
    """
    first = config.norms[0]
    # A star: each axis in turn about the middle of the others. A grid would cost their product.
    rank = middle(config.ranks)
    batch = middle(config.batches)
    star = [(first, r, batch) for r in config.ranks]
    star += [(first, rank, b) for b in config.batches]
    star += [(n, rank, batch) for n in config.norms]
    star = list(dict.fromkeys(star))  # the middle of the star once
    out: list[dict[str, Any]] = []
    for norms, r in dict.fromkeys((n, r) for n, r, _ in star):
        where = {"kind": "noise", "norms": norms, "rank": r}
        out += [where | {"seed": s} for s in range(config.seeds)]
    for norms, r, b in star:
        for method in ("exact", *(f"polynomial {degree}" for degree in config.degrees)):
            where = {"kind": "run", "norms": norms, "rank": r, "batch": b, "method": method}
            out += [where | {"seed": s} for s in range(config.seeds)]
    return out


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts that its tasks read."""
    return tasks.inputs([config.task])


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The moments of the gradient before and after exact training, or what one run ends with."""
    return _noise(point, config) if point["kind"] == "noise" else _run(point, config)


def _model(config: Config, point: dict[str, Any]) -> Transformer:
    """The pretrained base with fresh adapters, its norms as the point wants them."""
    recipe = Recipe(config.pretrain_steps, rate=config.rate, every=config.pretrain_steps)
    normalised = point["norms"] == "normalised"
    sizes = {"d_model": 32, "heads": 4, "layers": config.layers, "width": 4}
    base = bases.base(config.task, config.length, recipe, normalised=normalised, **sizes)
    lora = LoRA(point["rank"], 2.0 * point["rank"], adapt=NAMES)
    model = bases.pretrained(base, lora, config.cache, seed=point["seed"])
    return bases.with_scaled_scores(model, SHRINK) if point["norms"] == "shrunk" else model


def _recipe(config: Config, batch: int, seed: int) -> Recipe:
    order = {"seed": seed, "every": config.steps, "tests": config.tests}
    return Recipe(config.steps, batch, config.rate, **order)


def _noise(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """{"before", "after"}: moments as gradient_noise.compare has them, and norms."""
    seed = point["seed"]
    model = _model(config, point)
    task = tasks.load(config.task, config.length, "target")
    names = [f"polynomial {degree}" for degree in config.degrees]
    methods = {name: bases.read_method(name, config.length) for name in names}
    # Of a step that no run takes.
    data = batches.batch(task.train, config.sample, seed, config.steps + 1)

    def look() -> dict[str, Any]:
        moments = gradient_noise.compare(model, data, methods)
        return {"moments": moments, **_norms(model, data.tokens[:2])}

    before = look()
    # Exact training, which the runs are compared with.
    loop.train(model, task, _recipe(config, middle(config.batches), seed))
    return {"before": before, "after": look()}


@functools.cache
def _reports() -> Any:
    """(graphdef, params, tokens) -> a norm report of each layer."""

    def reports(graphdef, params, tokens):
        return per_layer.norms(nnx.merge(graphdef, params), tokens)

    return quick_jit(reports, static_argnums=0)


def _norms(model: Transformer, tokens: np.ndarray) -> dict[str, float]:
    """Gamma / sqrt(ln L) and R / ln L of the head where they are largest."""
    reports = _reports()(*nnx.split(model), tokens)
    return {
        name: max(float(np.max(getattr(report, name))) for report in reports)
        for name in ("gamma_ratio", "score_ratio")
    }


def _run(point: dict[str, Any], config: Config) -> dict[str, Any]:
    model = _model(config, point)
    model.set_methods([bases.read_method(point["method"], config.length)] * config.layers)
    task = tasks.load(config.task, config.length, "target")
    return bases.tune(model, task, _recipe(config, point["batch"], point["seed"]))
