"""Remark 5.2 along training: when fine-tuning carries a layer over the boundary, and what holds its
norms back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from flax import nnx
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from experiments.runner.config import Fields
from experiments.training import bases, tasks, watching
from experiments.training.tasks import Task
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import batches, loop
from lora_limits.training.loop import Recipe

VERSION = 2
POINTS = ("rates", "ranks", "alphas", "cases", "seeds")
X64 = True
BASES = Path("results/bases")
WIDTH = 8
Case = Literal["plain", "alpha/sqrt(r)", "query-key norm", "weight decay", "as pretrained"]


class Config(Fields):
    """Fine-tuning of a small classifier, all three projections adapted, Adam at a constant rate;
    beta = 1/sqrt(8).

    Runs: one of rates, ranks and alphas at a time, the others at their middle one; alpha/sqrt(r) at
    every rank above 1; the other cases at the largest rate, "as pretrained" at the middle one too.
    shrink: of W*_Q and W*_K, so that runs start below the boundary; not applied "as pretrained".
    decay: decoupled, of the adapters. seeds: of fresh adapters and of the order of the data; the
    base is one. tests: held-out sequences behind the scores, all of them where fewer; norms and
    certificates are of the first `sequences` of them.
    """

    rates: tuple[PositiveFloat, ...] = Field(min_length=1)
    ranks: tuple[PositiveInt, ...] = Field(min_length=1)
    alphas: tuple[PositiveFloat, ...] = Field(min_length=1)
    cases: tuple[Case, ...] = ("alpha/sqrt(r)", "query-key norm", "weight decay", "as pretrained")
    length: PositiveInt = 128
    pretraining: PositiveInt = 150
    steps: PositiveInt = 120
    every: PositiveInt = 10
    batch: PositiveInt = 16
    sequences: PositiveInt = 2
    tests: PositiveInt = 4096
    shrink: PositiveFloat = 0.4
    decay: PositiveFloat = 3.0
    degrees: tuple[PositiveInt, ...] = (2, 4)
    seeds: PositiveInt = 3

    @model_validator(mode="after")
    def _fitting(self):
        tasks.check_length("which_module", self.length)
        return self


def points(config: Config) -> list[dict[str, Any]]:
    """One point a run, seeds last: alike to XLA."""
    middle = {
        "rate": config.rates[len(config.rates) // 2],
        "rank": config.ranks[len(config.ranks) // 2],
        "alpha": config.alphas[len(config.alphas) // 2],
        "case": "plain",
    }
    # The middle is shared by all three axes and run once.
    runs = [middle]
    for name, values in (("rate", config.rates), ("rank", config.ranks), ("alpha", config.alphas)):
        runs += [middle | {name: value} for value in values if value != middle[name]]
    for case in config.cases:
        if case == "alpha/sqrt(r)":
            runs += [middle | {"rank": rank, "case": case} for rank in config.ranks if rank > 1]
        else:
            fast = [middle | {"rate": max(config.rates), "case": case}]
            runs += ([middle | {"case": case}] if case == "as pretrained" else []) + fast
    runs = [run for n, run in enumerate(runs) if run not in runs[:n]]
    return [run | {"seed": seed} for run in runs for seed in range(config.seeds)]


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts that its tasks read."""
    return tasks.inputs(["which_module"])


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms and certificates of each layer along the run, the steps at which it crosses, and what
    was learnt.
    """
    model = start(point, config)
    task = tasks.load("which_module", config.length, "target")
    recipe = Recipe(config.steps, batch=config.batch, tests=config.tests)
    # The recipe only says how many held-out sequences are scored, and in what batches.
    before = loop.evaluate(model, task.test, recipe)
    look = watching.watcher(model, batches.first(task.test, config.sequences), config.degrees)
    seen: list[list[dict[str, Any]]] = []
    steps = run(model, task, point, config, lambda: seen.append(look()))
    layers = []
    for rows in zip(*seen, strict=True):
        layer = {name: [row[name] for row in rows] for name in rows[0]}
        crossed = {name: _first_at_one(steps, layer[name]) for name in watching.NORMS}
        layers.append(layer | {"crossed": crossed})
    after = loop.evaluate(model, task.test, recipe)
    return {"steps": steps, "layers": layers, "before": before, "after": after}


def _first_at_one(steps: list[int], ratios: list[float]) -> int | None:
    """The first step at which a ratio to the boundary is 1 or more, or None."""
    return next((n for n, x in zip(steps, ratios, strict=True) if x >= 1), None)


def start(point: dict[str, Any], config: Config) -> Transformer:
    """The pretrained base with fresh adapters; its query and key weights shrunk, but for "as
    pretrained".

    Query-key normalisation undoes the shrinking: its base starts where it was.
    """
    case = point["case"]
    recipe = Recipe(config.pretraining, every=config.pretraining)
    sizes = {"d_model": 32, "heads": 4, "width": WIDTH, "normalised": case == "query-key norm"}
    base = bases.base("which_module", config.length, recipe, **sizes)
    scaling = case if case == "alpha/sqrt(r)" else "alpha/r"
    lora = LoRA(point["rank"], point["alpha"], scaling, adapt=NAMES)
    model = bases.pretrained(base, lora, BASES, seed=point["seed"])
    return model if case == "as pretrained" else bases.with_scaled_scores(model, config.shrink)


@functools.cache
def _stepper(rate: float, decay: float) -> tuple[optax.GradientTransformation, Any]:
    """(optimiser, compiled step): one program for all seeds of a run.

    A constant rate, so that the step of a crossing means the same in every run.
    """
    adam = optax.adamw(rate, weight_decay=decay)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def step(graphdef, trained, frozen, state, tokens, labels):
        grads = jax.grad(loop.loss_of, argnums=1)(graphdef, trained, frozen, tokens, labels)
        updates, state = optimiser.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    return optimiser, jax.jit(step, static_argnums=0)


def run(
    model: Transformer, task: Task, point: dict[str, Any], config: Config, look: Callable[[], None]
) -> list[int]:
    """Train the adapters in place, Adam with clipped gradients; look at every `every` steps.
    Returns those steps.
    """
    decay = config.decay if point["case"] == "weight decay" else 0.0
    optimiser, step = _stepper(point["rate"], decay)
    graphdef, trained, frozen = nnx.split(model, loop.ADAPTERS, ...)
    state = optimiser.init(trained)
    steps = []
    for n in range(config.steps + 1):
        if n % config.every == 0 or n == config.steps:
            nnx.update(model, trained)
            steps.append(n)
            look()
        if n < config.steps:
            # The order of the data is the same in all runs of a seed.
            data = batches.batch(task.train, config.batch, point["seed"], n)
            trained, state = step(graphdef, trained, frozen, state, *data)
    return steps
