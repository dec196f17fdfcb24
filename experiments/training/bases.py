"""What the training experiments start from and tell of a run: base models, pretrained once and
given fresh adapters; methods by name; scores before and after.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import lora_limits as ll
from experiments.runner import store
from experiments.training import tasks
from experiments.training.tasks import Task
from lora_limits.nn.heads import FEW
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Shape, Transformer
from lora_limits.problem import NAMES
from lora_limits.training import checkpoints, loop
from lora_limits.training.loop import EXACT, Recipe

VERSION = 1  # bump when pretraining would give other numbers
CAUSAL = ("next_byte",)
NUMBERS = {"exact": 0, "polynomial": 1, "skeleton": 1}  # behind each method's name


def check_name(name: str) -> None:
    """Raises ValueError unless `read_method` can read the name."""
    kind, *numbers = name.split()
    if NUMBERS.get(kind) != len(numbers) or not all(n.isascii() and n.isdecimal() for n in numbers):
        raise ValueError(f"got {name!r}, expected 'exact', 'polynomial DEGREE' or 'skeleton RANK'")


def fits(name: str, task: str, length: int) -> bool:
    """Whether a method approximates anything of a task: a skeleton looks ahead, which no causal task
    allows, and an odd polynomial is exact there over the first FEW keys, lest their sum be negative.
    """
    kind, *numbers = name.split()
    if task not in CAUSAL or kind == "exact":
        return True
    return kind != "skeleton" and (int(numbers[0]) % 2 == 0 or length > FEW)


def read_method(name: str, length: int) -> ll.Method:
    """The method of a name. A polynomial gets blocks short enough that attention is not exact: no
    task is shorter.
    """
    kind, *numbers = name.split()
    if kind == "exact":
        return EXACT
    if kind == "skeleton":
        return ll.Skeleton(int(numbers[0]))
    return ll.Polynomial(int(numbers[0]), block_size=min(512, length // 4))


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained base: the source part of a task at a length, sizes, recipe and the method it was
    trained with.

    options: of Shape, beside what the task fixes, as sorted pairs. words: as tasks.load takes it.
    """

    task: str
    length: int
    recipe: Recipe
    words: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    method: Any = EXACT

    def shape(self) -> Shape:
        """The sizes of the model."""
        task = self.source()
        return Shape(task.vocabulary, task.classes, self.length, **dict(self.options))

    def source(self) -> Task:
        """What it is pretrained on."""
        return tasks.load(self.task, self.length, "source", self.words)


def base(task: str, length: int, recipe: Recipe, words: int = 0, **options: Any) -> Base:
    """A base whose options of Shape are given by name."""
    return Base(task, length, recipe, words, tuple(sorted(options.items())))


def pretrained(base: Base, lora: LoRA, cache: str | Path, *, seed: int = 0) -> Transformer:
    """The base with fresh adapters of that seed, pretrained on its task's source and kept under
    `cache`, by content.

    Every parameter but the adapters is trained. Processes that want the same base at once each make
    it; one is kept.
    """
    # The texts are those of the Python that runs.
    told = {"method": str(base.method)} | tasks.inputs([base.task])
    folder = Path(cache) / store.key("base", VERSION, {}, dataclasses.asdict(base) | told)
    if not folder.exists():
        checkpoints.publish(folder, _pretrain(base))
    model = Transformer(base.shape(), lora, rngs=nnx.Rngs(seed))
    # Restored even when just made: every run starts from the bytes that were kept.
    kept = checkpoints.restore(folder, nnx.state(model, loop.BASE), {})[1]
    nnx.update(model, kept)
    return model


def _pretrain(base: Base) -> Any:
    """Parameters of the base after training: the same whoever asks first."""
    shape = base.shape()
    model = Transformer(shape, LoRA(adapt=NAMES), rngs=nnx.Rngs(base.recipe.seed))
    model.set_methods([base.method] * shape.layers)
    loop.train(model, base.source(), base.recipe, what=loop.BASE)
    return nnx.state(model, loop.BASE)


def with_scaled_scores(model: Transformer, factor: float) -> Transformer:
    """A copy whose W*_Q and W*_K are `factor` times as large; the model itself is not touched.

    Frozen scores grow by factor^2, unless queries and keys are normalised.
    """
    copy = nnx.clone(model)
    for block in copy.blocks:
        for kernel in (block.attention.query.kernel, block.attention.key.kernel):
            kernel[...] = factor * kernel[...]
    return copy


def stretch(model: Transformer, length: int) -> None:
    """Makes a model of square images read `length` pixels: its positions interpolated on the grid,
    in place.
    """
    old, new = (math.isqrt(n) for n in (model.shape.length, length))
    grid = model.position[...].reshape(old, old, -1)
    finer = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear")
    model.position = nnx.Param(finer.reshape(new * new, -1))
    model.shape = dataclasses.replace(model.shape, length=length)


def tune(model: Transformer, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Train in place; held-out scores "before" and after, by the model's methods ("own") and by
    exact attention.

    "finite": whether every loss on the way was, held out or not.
    """
    history = loop.train(model, task, recipe)
    before, own = (
        {"loss": history["test_loss"][n], "accuracy": history["accuracy"][n]} for n in (0, -1)
    )
    exact = loop.with_methods(model, [EXACT] * len(model.blocks))
    return {
        "before": before,
        "own": own,
        "exact": loop.evaluate(exact, task.test, recipe),
        "finite": bool(np.isfinite(history["loss"] + history["test_loss"]).all()),
    }
