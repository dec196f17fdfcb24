"""Which tasks mind a coarse approximation: what each loses as the features k become few."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from experiments.runner.config import Fields
from experiments.training import bases, tasks
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import batches, gradient_noise
from lora_limits.training.loop import Recipe

VERSION = 2
POINTS = ("lengths", "degrees", "skeletons", "seeds")
PLACES = ("cache",)
WIDTH = 4


class Config(Fields):
    """Rank-4 adapters on Q, K and V of a model with normalised queries and keys of width 4,
    fine-tuned on each task.

    degrees: of Polynomial, k = binom(4 + degree, degree); skeletons: ranks of Skeleton; of both,
    those that approximate anything of a task. sample: examples behind the error of the gradient.
    margin: of accuracy, within which a loss is to count as none; said before anything runs. cache:
    where pretrained bases are kept.
    """

    lengths: dict[Literal["digits", "prose_or_code", "which_module", "next_byte"], PositiveInt]
    degrees: tuple[NonNegativeInt, ...]
    skeletons: tuple[PositiveInt, ...]
    seeds: PositiveInt
    pretrain_steps: PositiveInt = 400
    steps: PositiveInt = 100
    batch: PositiveInt = 16
    rate: PositiveFloat = 1e-2
    tests: PositiveInt = 1024
    sample: PositiveInt = 64
    layers: PositiveInt = 1
    margin: PositiveFloat = 0.01
    cache: str = Field(default="results/bases", min_length=1)

    @model_validator(mode="after")
    def _fitting(self):
        for task, length in self.lengths.items():
            tasks.check_length(task, length)
        return self


def points(config: Config) -> list[dict[str, Any]]:
    """A run for each task, method and seed, seeds last: alike to XLA."""
    out = []
    for task, length in config.lengths.items():
        methods = ["exact", *(f"polynomial {degree}" for degree in config.degrees)]
        methods += [f"skeleton {rank}" for rank in config.skeletons]
        out += [
            {"task": task, "length": length, "method": m, "seed": s}
            for m in methods
            if bases.fits(m, task, length)
            for s in range(config.seeds)
        ]
    return out


def features(method: str) -> int | None:
    """k of a method by its name; None for the exact one."""
    kind, *numbers = method.split()
    if kind == "exact":
        return None
    number = int(numbers[0])
    return math.comb(WIDTH + number, number) if kind == "polynomial" else number


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts that its tasks read."""
    return tasks.inputs(config.lengths)


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Scores of a run as `bases.tune` has them, k, and the moments of gradient and error before and
    after it.
    """
    length = point["length"]
    seed = point["seed"]
    model = _model(config, point["task"], length, seed)
    task = tasks.load(point["task"], length, "target")
    method = bases.read_method(point["method"], length)
    # Of a step that no run takes.
    data = batches.batch(task.train, config.sample, seed, config.steps + 1)
    watched = {} if point["method"] == "exact" else {"method": method}
    model.set_methods([method] * config.layers)
    # Before the run and after it: norms grow along training, and errors with them.
    before = gradient_noise.compare(model, data, watched)
    order = {"seed": seed, "every": config.steps, "tests": config.tests}
    scores = bases.tune(model, task, Recipe(config.steps, config.batch, config.rate, **order))
    gradient = {"before": before, "after": gradient_noise.compare(model, data, watched)}
    return scores | {"gradient": gradient, "features": features(point["method"])}


def _model(config: Config, task: str, length: int, seed: int) -> Transformer:
    """The task's pretrained base with fresh adapters."""
    recipe = Recipe(config.pretrain_steps, rate=config.rate, every=config.pretrain_steps)
    sizes = {"d_model": 32, "heads": 4, "layers": config.layers, "normalised": True, "width": WIDTH}
    base = bases.base(task, length, recipe, **sizes)
    return bases.pretrained(base, LoRA(4, 8.0, adapt=NAMES), config.cache, seed=seed)
