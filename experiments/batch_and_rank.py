"""Norm bound, rank and mini-batch: when the error of an approximate gradient drowns in the noise of
its batch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from experiments.runner.config import Fields

VERSION = 1
SHARED = (
    "task",
    "length",
    "pretrain_steps",
    "steps",
    "rate",
    "tests",
    "sample",
    "layers",
    "degrees",
    "batches",
)
ADAPT = ("query", "key", "value")
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


def middle(values: tuple[Any, ...]) -> Any:
    """The value that stands while others vary."""
    return values[len(values) // 2]


def points(config: Config) -> list[dict[str, Any]]:
    """Moments of the gradient for every (norms, rank, seed) of the runs, then the runs, seeds last:
    alike to XLA.
    """
    first = config.norms[0]
    rank = middle(config.ranks)
    batch = middle(config.batches)
    star = [(first, r, batch) for r in config.ranks] + [(first, rank, b) for b in config.batches]
    star = list(dict.fromkeys([*star, *((n, rank, batch) for n in config.norms)]))
    out = []
    for norms, r in dict.fromkeys((n, r) for n, r, _ in star):
        out += [
            {"kind": "noise", "norms": norms, "rank": r, "seed": s} for s in range(config.seeds)
        ]
    for norms, r, b in star:
        for method in ("exact", *(f"polynomial {degree}" for degree in config.degrees)):
            where = {"kind": "run", "norms": norms, "rank": r, "batch": b, "method": method}
            out += [where | {"seed": s} for s in range(config.seeds)]
    return out


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The moments of the gradient before and after exact training, or what one run ends with."""
    return _noise(point, config) if point["kind"] == "noise" else _run(point, config)


def model_of(config: Config, point: dict[str, Any]) -> Any:
    """The pretrained base with fresh adapters, its norms as the point wants them."""
    from experiments.training import loop
    from lora_limits.nn.lora import LoRA

    recipe = loop.Recipe(config.pretrain_steps, rate=config.rate, every=config.pretrain_steps)
    sizes = {
        "d_model": 32,
        "heads": 4,
        "layers": config.layers,
        "normalised": point["norms"] == "normalised",
        "width": 4,
    }
    base = loop.Base(config.task, config.length, recipe, options=tuple(sorted(sizes.items())))
    lora = LoRA(point["rank"], 2.0 * point["rank"], adapt=ADAPT)
    model = loop.pretrained(base, lora, Path(config.cache), seed=point["seed"])
    if point["norms"] == "shrunk":
        for block in model.blocks:
            for kernel in (block.attention.query.kernel, block.attention.key.kernel):
                kernel[...] = SHRINK * kernel[...]
    return model


def _recipe(config: Config, batch: int, seed: int) -> Any:
    from experiments.training import loop

    return loop.Recipe(
        config.steps, batch, config.rate, seed, every=config.steps, tests=config.tests
    )


def _noise(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """{"before", "after"}: moments as gradient_noise.compare has them, and norms."""
    from experiments.finetune import read_method
    from experiments.training import gradient_noise, loop, tasks

    model = model_of(config, point)
    task = tasks.load(config.task, config.length, "target")
    methods = {
        f"polynomial {g}": read_method(f"polynomial {g}", config.length) for g in config.degrees
    }
    data = tasks.batch(
        task.train, config.sample, point["seed"], config.steps + 1
    )  # a step that no run takes

    def look():
        return {
            "moments": gradient_noise.compare(model, data, methods),
            **_norms(model, data.tokens[:2]),
        }

    before = look()
    loop.train(model, task, _recipe(config, middle(config.batches), point["seed"]))
    return {"before": before, "after": look()}


@functools.cache
def _reports() -> Any:
    from flax import nnx

    from lora_limits.instruments.compiling import quick_jit
    from lora_limits.nn import per_layer

    return quick_jit(
        lambda graphdef, params, x: per_layer.norms(nnx.merge(graphdef, params), x),
        static_argnums=0,
    )


def _norms(model: Any, tokens: Any) -> dict[str, float]:
    """Gamma / sqrt(ln L) and R / ln L of the head where they are largest."""
    import numpy as np
    from flax import nnx

    reports = _reports()(*nnx.split(model), tokens)
    return {
        n: max(float(np.max(getattr(r, n))) for r in reports)
        for n in ("gamma_ratio", "score_ratio")
    }


def _run(point: dict[str, Any], config: Config) -> dict[str, Any]:
    from experiments.finetune import read_method
    from experiments.training import tasks

    model = model_of(config, point)
    model.set_methods([read_method(point["method"], config.length)] * config.layers)
    return tune(
        model,
        tasks.load(config.task, config.length, "target"),
        _recipe(config, point["batch"], point["seed"]),
    )


def tune(model: Any, task: Any, recipe: Any) -> dict[str, Any]:
    """Train in place; held-out scores "before" and after, by the model's methods ("own") and by
    exact attention.

    "finite": whether every loss on the way was, held out or not.
    """
    import numpy as np

    from experiments.training import loop

    history = loop.train(model, task, recipe)
    before, own = (
        {"loss": history["test_loss"][n], "accuracy": history["accuracy"][n]} for n in (0, -1)
    )
    exact = loop.with_methods(model, [loop.EXACT] * len(model.blocks))
    scores = {"before": before, "own": own, "exact": loop.evaluate(exact, task.test, recipe)}
    return scores | {"finite": bool(np.isfinite(history["loss"] + history["test_loss"]).all())}
