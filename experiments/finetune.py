"""Fine-tuning by exact and by approximate gradients, side by side: loss, metric, gradient error,
time and memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from experiments.contenders.methods import exact_methods, fastest
from experiments.runner import store
from experiments.runner.config import Fields
from experiments.training import bases, tasks
from lora_limits.instruments import timing
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import batches, checkpoints, loop
from lora_limits.training.loop import Recipe

VERSION = 2
POINTS = ("methods", "long_methods", "seeds", "long_seeds")
PLACES = ("cache",)
BLOCKS = (128, 512, 2048)  # of the exact contenders, timed beside XLA's own
SIZES = ("d_model", "heads", "width", "layers", "normalised")  # of the model


class Case(Fields):
    """Sizes of the model, of pretraining on each task's source and of fine-tuning on its target.

    tasks: and their lengths. words: vocabulary of which_module; the other texts are read byte by
    byte. base_length: pixels that the base was pretrained on, where fewer.
    """

    tasks: dict[Literal["digits", "prose_or_code", "which_module", "next_byte"], PositiveInt]
    pretrain_steps: PositiveInt
    pretrain_batch: PositiveInt = 16
    steps: PositiveInt
    batch: PositiveInt = 16
    rate: PositiveFloat = 1e-2
    every: PositiveInt = 25
    tests: PositiveInt = 256
    final_tests: PositiveInt = 512
    d_model: PositiveInt = 32
    heads: PositiveInt = 4
    width: PositiveInt = 4
    layers: PositiveInt = 2
    normalised: bool = True
    words: PositiveInt = 512
    base_length: PositiveInt | None = None

    @model_validator(mode="after")
    def _fitting(self):
        for task, length in self.tasks.items():
            tasks.check_length(task, length)
        return self

    @model_validator(mode="after")
    def _square(self):
        if self.base_length:
            squares = all(math.isqrt(n) ** 2 == n for n in (*self.tasks.values(), self.base_length))
            if set(self.tasks) != {"digits"} or not squares:
                got = f"{self.base_length} with {self.tasks}"
                raise ValueError(f"base_length: got {got}, expected squares, of digits alone")
        return self


class Config(Fields):
    """Every method of `methods` on every task of `short`, and of `long_methods` on `long`; adapters
    on Q, K and V.

    A method: "exact", "polynomial DEGREE" or "skeleton RANK". margin: of accuracy, within which
    training is to count as equivalent; said before it runs, and only judged by. cache: where
    pretrained bases are kept.
    """

    methods: tuple[str, ...]
    long_methods: tuple[str, ...]
    seeds: PositiveInt
    long_seeds: PositiveInt
    short: Case
    long: Case
    rank: PositiveInt = 4
    alpha: PositiveFloat = 8.0
    margin: PositiveFloat = 0.02
    repeats: PositiveInt = 5
    max_seconds: PositiveFloat = 8.0
    cache: str = Field(default="results/bases", min_length=1)

    @field_validator("methods", "long_methods")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            bases.check_name(name)
        return names


def points(config: Config) -> list[dict[str, Any]]:
    """A run for each case, task, seed and method; before them the step of every method timed, once
    for each task.
    """
    out = []
    cases = {
        "short": (config.methods, config.seeds),
        "long": (config.long_methods, config.long_seeds),
    }
    for case, (methods, seeds) in cases.items():
        for task, length in getattr(config, case).tasks.items():
            where = {"case": case, "task": task, "length": length}
            fitting = [m for m in methods if bases.fits(m, task, length)]
            out.append({"kind": "time", **where, "methods": fitting})
            out += [
                {"kind": "run", **where, "method": m, "seed": s}
                for s in range(seeds)
                for m in fitting
            ]
    return out


def _words(case: Case, task: str) -> int:
    return case.words if task == "which_module" else 0


def _model(config: Config, point: dict[str, Any], seed: int) -> Transformer:
    """The pretrained base with fresh adapters of that seed."""
    case = getattr(config, point["case"])
    recipe = Recipe(case.pretrain_steps, case.pretrain_batch, 5e-3, every=case.pretrain_steps)
    sizes = {name: getattr(case, name) for name in SIZES}
    length = case.base_length or point["length"]
    base = bases.base(point["task"], length, recipe, _words(case, point["task"]), **sizes)
    lora = LoRA(config.rank, config.alpha, adapt=NAMES)
    model = bases.pretrained(base, lora, config.cache, seed=seed)
    # Pretraining at full length would cost more than all runs; a base of small images is made to
    # read larger ones.
    if length != point["length"]:
        bases.stretch(model, point["length"])
    return model


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts that its tasks read."""
    return tasks.inputs([*config.short.tasks, *config.long.tasks])


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """A run's history and its final scores, or the time and memory of a step by every contender."""
    return _time(point, config) if point["kind"] == "time" else _run(point, config)


def _run(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The history, and "final": held-out loss and accuracy under exact attention, whatever the
    training was.

    A run that is killed goes on from its last evaluation.
    """
    case = getattr(config, point["case"])
    seed = point["seed"]
    model = _model(config, point, seed)
    model.set_methods([bases.read_method(point["method"], point["length"])] * case.layers)
    task = tasks.load(point["task"], point["length"], "target", _words(case, point["task"]))
    recipe = Recipe(case.steps, case.batch, case.rate, seed, case.every, case.tests)
    # Named as the row will be, so that no other run goes on from it.
    fields = config.model_dump(mode="json", exclude={*POINTS, *PLACES}) | inputs(config)
    folder = Path(config.cache) / "runs" / store.key("finetune", VERSION, fields, point)
    watch = None if point["method"] == "exact" else loop.compare
    history = loop.train(model, task, recipe, watch=watch, folder=folder)
    checkpoints.forget(folder)
    if point["method"] == "exact" and case.final_tests == case.tests:
        # The last evaluation on the way was this one.
        final = {"loss": history["test_loss"][-1], "accuracy": history["accuracy"][-1]}
    else:
        exact = loop.with_methods(model, [loop.EXACT] * case.layers)
        longer = dataclasses.replace(recipe, tests=case.final_tests)
        final = loop.evaluate(exact, task.test, longer)
    return history | {"final": final}


def xla(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
    """jax.nn.dot_product_attention, dense, at full precision."""
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="xla")


def _time(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """{contender: seconds, spread, repeats, temporary bytes} of a training step; "best": the
    fastest exact one.
    """
    case = getattr(config, point["case"])
    length = point["length"]
    model = _model(config, point, 0)
    recipe = Recipe(case.steps, case.batch, case.rate)
    task = tasks.load(point["task"], length, "target", _words(case, point["task"]))
    data = batches.batch(task.train, case.batch, 0, 0)
    # One block over the whole sequence would be dense, as XLA's own is.
    tiled = exact_methods(length - 1, BLOCKS, otherwise=loop.EXACT.block_size)
    exact: dict[str, Any] = {**tiled, "xla": xla}
    approximate = [name for name in point["methods"] if name != "exact"]
    contenders = exact | {name: bases.read_method(name, length) for name in approximate}
    out: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, method in contenders.items():
        # One model, its methods exchanged: every contender starts from the same parameters.
        model.set_methods([method] * case.layers)
        graphdef, trained, frozen = nnx.split(model, loop.ADAPTERS, ...)
        args = (trained, frozen, loop.optimiser(recipe).init(trained), *data)
        run = loop.compiled_step(recipe, graphdef, *args)
        calls[name] = functools.partial(run, *args)
        out[name] = {"temporary": timing.temporary_bytes(run)}
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    for name, time in times.items():
        out[name] |= time
    return {"methods": out, "best": fastest(times, exact)}
