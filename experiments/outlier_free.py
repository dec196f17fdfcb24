"""Table 1 put to its theory: LoRA on attention of OPT's shapes, softmax against the outlier-free
softmax_1.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

import lora_limits as ll
from experiments.contenders.methods import errors_by_method, exact_methods, fastest, gradient_alone
from experiments.problems import causal_heads
from experiments.runner.config import Fields
from experiments.training import bases, tasks
from lora_limits.instruments import timing
from lora_limits.instruments.counting import count_operations
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import batches, loop
from lora_limits.training.loop import Recipe

VERSION = 3
POINTS = ("models", "seeds")
BASES = Path("results/bases")
SHAPES = {"125M": (768, 12), "350M": (1024, 16), "1.3B": (2048, 32)}
WIDTH = 64
SCALE = 2.0  # alpha / r of Table 1: 256 / 128
BLOCKS = (512, 1024)
DEGREES = (1, 2)  # of the polynomials tried
Model = Literal["125M", "350M", "1.3B"]
Family = Literal["svd", "skeleton", "sparse", "polynomial"]
Attention = Literal["softmax", "softmax_1"]


class Config(Fields):
    """Causal decoders with OPT's d_model and heads of width 64, full LoRA, float32; one sequence a
    step.

    Bases are pretrained here on prose, their MLP no wider than d_model, and their adapters tuned on
    code. ladder: widths of the factors tried. timed: tokens of what is timed, with OPT's own MLP (4
    d_model). stretch: of W*_Q and W*_K, for a step with other norms. heads, sequences: measured of
    each layer. seeds: of base, adapters and the order of the data, behind all but the times.
    """

    models: tuple[Model, ...] = ("125M", "350M", "1.3B")
    attentions: tuple[Attention, ...] = ("softmax", "softmax_1")
    ranks: tuple[PositiveInt, ...] = Field(default=(128, 4), min_length=1)
    layers: PositiveInt = 1
    length: PositiveInt = 512
    pretraining: PositiveInt = 40
    tuning: PositiveInt = 10
    ladder: tuple[PositiveInt, ...] = (32, 64, 128)
    families: tuple[Family, ...] = ("svd", "skeleton", "sparse", "polynomial")
    heads: PositiveInt = 3
    sequences: PositiveInt = 2
    timed: PositiveInt = 1024
    stretch: PositiveFloat = 4.0
    repeats: PositiveInt = 9
    max_seconds: PositiveFloat = 30.0
    seeds: PositiveInt = 3

    @model_validator(mode="after")
    def _fitting(self):
        for length in (self.length, self.timed):
            tasks.check_length("next_byte", length)
        return self


def points(config: Config) -> list[dict[str, Any]]:
    """Features of each model, attention and seed, the time of its step at the first rank, of one
    head's gradient at all.
    """
    out: list[dict[str, Any]] = [
        {"part": "features", "model": model, "attention": attention, "seed": seed}
        for model in config.models
        for attention in config.attentions
        for seed in range(config.seeds)
    ]
    out += [{"part": "step", "model": model, "rank": config.ranks[0]} for model in config.models]
    return out + [{"part": "head", "rank": r} for r in config.ranks]


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts that its tasks read."""
    return tasks.inputs(["next_byte"])


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """What the part of the point measures."""
    parts = {"head": head_times, "step": step_times, "features": features}
    return parts[point["part"]](point, config)


def methods(config: Config) -> dict[str, ll.Method]:
    """The approximate methods of the config's families by name: "skeleton 32" has width 32,
    "polynomial 2" degree 2.
    """
    makers: dict[str, Any] = {
        "svd": ll.Svd,
        "skeleton": ll.Skeleton,
        # Its width counts what it stores: half entries, half skeleton.
        "sparse": lambda k: ll.SparseLowRank(k // 2, k - k // 2),
    }
    out: dict[str, ll.Method] = {}
    for family in config.families:
        if family in makers:
            out |= {f"{family} {k}": makers[family](k) for k in config.ladder}
    if "polynomial" in config.families:
        out |= {f"polynomial {degree}": ll.Polynomial(degree) for degree in DEGREES}
    return out


def head_times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Seconds of one head's gradients at `timed` tokens by every method; of inputs as wide as the
    head.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32) / shape[-1] ** 0.5

    # What a gradient costs depends on shapes alone, not on the numbers.
    x = normal(config.timed, WIDTH)
    r = point["rank"]
    weights = ll.AttentionWeights(**{name: normal(WIDTH, WIDTH) for name in NAMES})
    adapters = {name: ll.Adapter(normal(r, WIDTH), normal(WIDTH, r)) for name in NAMES}
    problem = ll.LoRAProblem(
        x, x, x, x, weights=weights, adapters=adapters, scale=SCALE, beta=WIDTH**-0.5
    )
    # The decomposition of f is the limit of every factor and no algorithm: not timed.
    tried = {name: method for name, method in methods(config).items() if not name.startswith("svd")}
    exact = exact_methods(config.timed, BLOCKS)
    calls = {}
    for name, method in {**tried, **exact}.items():
        run = jax.jit(functools.partial(gradient_alone, method=method))
        calls[name] = functools.partial(run.lower(problem).compile(), problem)
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    return {"methods": times, "exact": times[fastest(times, exact)]["seconds"]}


def step_times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Seconds and operations of a LoRA step, exact, by turns: softmax, the same on stretched
    scores, softmax_1.
    """
    task = tasks.load("next_byte", config.timed, "target")
    data = batches.batch(task.train, 1, 0, 0)
    gradient = jax.grad(loop.loss_of, argnums=1)
    run = jax.jit(gradient, static_argnums=0)
    calls = {}
    operations = {}
    for attention in config.attentions:
        options = sizes(point["model"], attention, config, mlp=4)
        shape = bases.base("next_byte", config.timed, Recipe(1), **options).shape()
        model = Transformer(shape, lora_of(point["rank"]), rngs=nnx.Rngs(0))
        graphdef, *params = nnx.split(model, loop.ADAPTERS, ...)
        calls[attention] = functools.partial(run, graphdef, *params, *data)
        counted = functools.partial(gradient, graphdef)
        operations[attention] = count_operations(counted, *params, *data)["flops"]
        if attention == "softmax":
            # The same step on larger scores: if norms changed its time, this one would differ.
            other = bases.with_scaled_scores(model, config.stretch)
            parts = nnx.split(other, loop.ADAPTERS, ...)
            calls["stretched"] = functools.partial(run, *parts, *data)
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    return {
        "steps": times,
        "operations": operations,
        "sequences": len(task.train.tokens),
        "heads": config.layers * SHAPES[point["model"]][1],
    }


def lora_of(rank: int) -> LoRA:
    """Full LoRA of that rank at the scale of Table 1."""
    return LoRA(rank, SCALE * rank, adapt=NAMES)


def sizes(model: str, attention: str, config: Config, mlp: int) -> dict[str, Any]:
    """Options of Shape. mlp: its width over d_model."""
    d_model, heads = SHAPES[model]
    return {
        "d_model": d_model,
        "heads": heads,
        "width": WIDTH,
        "layers": config.layers,
        "mlp": mlp * d_model,
        "softmax_1": attention == "softmax_1",
    }


def features(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms and outliers of a pretrained and tuned model, and the error of every method on its
    heads, by rank.
    """
    options = sizes(point["model"], point["attention"], config, mlp=1)
    same = {"batch": 1, "rate": 1e-3, "seed": point["seed"], "tests": 2}
    recipe = Recipe(config.pretraining, every=config.pretraining, **same)
    base = bases.base("next_byte", config.length, recipe, **options)
    task = tasks.load("next_byte", config.length, "target")
    seen = batches.first(task.test, config.sequences)
    out: dict[str, Any] = {"errors": {}}
    for rank in config.ranks:
        model = bases.pretrained(base, lora_of(rank), BASES, seed=point["seed"])
        tuning = Recipe(config.tuning, every=config.tuning, **same)
        history = loop.train(model, task, tuning)
        found, problems = causal_heads.look(model, seen, config.heads)
        out["errors"][str(rank)] = errors_by_method(problems, methods(config))
        # Norms are told once a model; they are those of the first rank.
        if rank == config.ranks[0]:
            out |= found | {"loss": history["test_loss"][-1]}
    return out
