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

VERSION = 2
POINTS = ("ranks", "norms", "batches", "rates", "followed", "seeds")
PLACES = ("cache",)
SHRINK = 0.35
PRETRAINING = 1e-2  # rate
LOOKS = 10  # at a followed run, along its way
Norms = Literal["normalised", "shrunk", "free"]


class Config(Fields):
    """Adapters on Q, K and V of a classifier with heads of width 4; alpha = 2 r, so that the scale
    is 2 at every rank.

    Runs, exact and at every degree: every batch and rate at each of norms, at the middle rank; then
    the other ranks at the first of norms, the first rate and the middle batch. norms: queries and
    keys "normalised", so that no score passes sqrt(4) = 2; or free, from a base whose W*_Q and W*_K
    were "shrunk" by 0.35, or are as they were. long_steps: of runs that are followed, at the
    smallest rate, the middle batch and `followed` norms. sample: examples behind the moments of the
    gradient. cache: where pretrained bases are kept.
    """

    degrees: tuple[NonNegativeInt, ...] = Field(min_length=1)
    ranks: tuple[PositiveInt, ...] = Field(min_length=1)
    batches: tuple[PositiveInt, ...] = Field(min_length=1)
    norms: tuple[Norms, ...] = Field(min_length=1)
    rates: tuple[PositiveFloat, ...] = Field(min_length=1)
    followed: tuple[Norms, ...] = ("normalised", "shrunk")
    long_steps: PositiveInt = 1000
    seeds: PositiveInt
    task: Literal["digits", "prose_or_code", "which_module"] = "digits"
    length: PositiveInt = 64
    pretrain_steps: PositiveInt = 400
    steps: PositiveInt = 100
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
    """Moments of the gradient for every (norms, rank, rate) of the runs, the runs, and those that
    are followed; seeds last: alike to XLA.
    """
    first, rate = config.norms[0], config.rates[0]
    rank, batch = middle(config.ranks), middle(config.batches)
    # Norms, batches and rates are crossed, so that what each of them does can be told apart.
    grid = [
        {"norms": n, "rank": rank, "batch": b, "rate": x}
        for n in config.norms
        for x in config.rates
        for b in config.batches
    ]
    others = [r for r in config.ranks if r != rank]
    grid += [{"norms": first, "rank": r, "batch": batch, "rate": rate} for r in others]
    methods = ["exact", *(f"polynomial {degree}" for degree in config.degrees)]
    noise = [run | {"batch": batch} for run in grid]
    slow = {"rank": rank, "batch": batch, "rate": min(config.rates)}
    out = [{"kind": "noise", **where} for n, where in enumerate(noise) if where not in noise[:n]]
    out += [{"kind": "run", **run, "method": m} for run in grid for m in methods]
    out += [
        {"kind": "followed", "norms": n, **slow, "method": m}
        for n in config.followed
        for m in methods
    ]
    return [point | {"seed": seed} for point in out for seed in range(config.seeds)]


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts that its tasks read."""
    return tasks.inputs([config.task])


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The moments of the gradient before and after exact training, what one run ends with, or what
    it goes through.
    """
    return {"noise": _noise, "run": _run, "followed": _followed}[point["kind"]](point, config)


def _model(config: Config, point: dict[str, Any]) -> Transformer:
    """The pretrained base with fresh adapters, its norms as the point wants them."""
    recipe = Recipe(config.pretrain_steps, rate=PRETRAINING, every=config.pretrain_steps)
    normalised = point["norms"] == "normalised"
    sizes = {"d_model": 32, "heads": 4, "layers": config.layers, "width": 4}
    base = bases.base(config.task, config.length, recipe, normalised=normalised, **sizes)
    lora = LoRA(point["rank"], 2.0 * point["rank"], adapt=NAMES)
    model = bases.pretrained(base, lora, config.cache, seed=point["seed"])
    return bases.with_scaled_scores(model, SHRINK) if point["norms"] == "shrunk" else model


def _recipe(config: Config, point: dict[str, Any]) -> Recipe:
    order = {"seed": point["seed"], "every": config.steps, "tests": config.tests}
    return Recipe(config.steps, point["batch"], point["rate"], **order)


def _sample(config: Config, task: tasks.Task, point: dict[str, Any]) -> batches.Data:
    """Examples of a step that no run takes."""
    step = max(config.steps, config.long_steps) + 1
    return batches.batch(task.train, config.sample, point["seed"], step)


def _noise(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """{"before", "after"}: moments as gradient_noise.compare has them, and norms."""
    model = _model(config, point)
    task = tasks.load(config.task, config.length, "target")
    names = [f"polynomial {degree}" for degree in config.degrees]
    methods = {name: bases.read_method(name, config.length) for name in names}
    data = _sample(config, task, point)

    def look() -> dict[str, Any]:
        moments = gradient_noise.compare(model, data, methods)
        return {"moments": moments, **_norms(model, data.tokens[:2])}

    before = look()
    # Exact training, which the runs are compared with.
    loop.train(model, task, _recipe(config, point))
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
    return bases.tune(model, task, _recipe(config, point))


def _followed(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """{"steps", "test_loss", "accuracy"} along a run, by its own method, "exact_loss" of the same
    adapters under exact attention, and there of the gradient: squared "noise" of its batch, "bias"
    of the method and its "variance", and the norms.
    """
    model = _model(config, point)
    method = bases.read_method(point["method"], config.length)
    model.set_methods([method] * config.layers)
    task = tasks.load(config.task, config.length, "target")
    data = _sample(config, task, point)

    order = {"seed": point["seed"], "every": max(config.long_steps // LOOKS, 1)}
    recipe = Recipe(config.long_steps, point["batch"], point["rate"], tests=config.tests, **order)

    def watch(model: Any, _: batches.Data) -> dict[str, float]:
        found = gradient_noise.compare(model, data, {"own": method})
        noise, variance = (found[name]["spread"] / point["batch"] for name in ("exact", "own"))
        told = {"noise": noise, "bias": found["own"]["mean"], "variance": variance}
        exact = loop.with_methods(model, [loop.EXACT] * config.layers)
        told |= {"exact_loss": loop.evaluate(exact, task.test, recipe)["loss"]}
        return told | _norms(model, data.tokens[:2])

    history = loop.train(model, task, recipe, watch=watch)
    told = ("steps", "test_loss", "exact_loss", "accuracy", "noise", "bias", "variance")
    return {name: history[name] for name in (*told, "gamma_ratio", "score_ratio")}
