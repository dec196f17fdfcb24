"""Pretraining and fine-tuning: one loop, resumable, with the gradient held against the exact one
along the way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import lora_limits as ll
from experiments.runner import store
from experiments.training import checkpoints, tasks
from experiments.training.tasks import Data, Task
from lora_limits.instruments import timing
from lora_limits.instruments.compiling import quick_jit
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Shape, Transformer
from lora_limits.problem import NAMES

VERSION = 1  # bump when pretraining would give other numbers
ADAPTERS = nnx.LoRAParam
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
EXACT = ll.Exact(512)
SHOWN = 200  # steps from which a run shows its progress on a terminal


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Adam, gradients clipped to norm 1, `rate` reached after a tenth of the steps, then a cosine
    down to 0.

    seed: of the order of the data. every: steps between evaluations, on the first `tests` held-out
    sequences.
    """

    steps: int
    batch: int = 16
    rate: float = 3e-3
    seed: int = 0
    every: int = 50
    tests: int = 256


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """The recipe's optimiser and its schedule."""
    warm = max(recipe.steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, warm, max(recipe.steps, warm + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of classes (B,) or of next tokens (B, L)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def loss_of(
    graphdef: Any, trained: Any, frozen: Any, tokens: jax.Array, labels: jax.Array
) -> jax.Array:
    """The loss of a split model: `nnx.split(model, what, ...)` gives its first three arguments."""
    return loss(nnx.merge(graphdef, trained, frozen)(tokens), labels)


gradients = jax.jit(jax.grad(loss_of, argnums=1), static_argnums=0)
# What is run a few times on short sequences costs more to compile than to run.
_quick_gradients = quick_jit(jax.grad(loss_of, argnums=1), static_argnums=0)
SHORT = 1024
_compiled: dict[Any, Any] = {}


def compiled_step(recipe: Recipe, graphdef: Any, *args: Any) -> Any:
    """The executable (trained, frozen, state, tokens, labels) -> (trained, state, loss), for `args`
    such as these.

    Compiled once in a process for each graphdef, which holds the methods, each shape of `args` and
    each optimiser.
    """

    def step(trained, frozen, state, tokens, labels):
        value, grads = jax.value_and_grad(functools.partial(loss_of, graphdef))(
            trained, frozen, tokens, labels
        )
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts by floats
            updates, state = optimiser(recipe).update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(args))
    key = (recipe.steps, recipe.rate, graphdef, jax.tree.structure(args), shapes)
    if key not in _compiled:
        _compiled[key] = jax.jit(step).lower(*args).compile()
    return _compiled[key]


def _score_of(
    graphdef: Any, params: Any, tokens: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = nnx.merge(graphdef, params)(tokens)
    return loss(logits, labels), (logits.argmax(-1).astype(labels.dtype) == labels).mean()


_score = jax.jit(_score_of, static_argnums=0)
_quick_score = quick_jit(_score_of, static_argnums=0)


def evaluate(model: Transformer, data: Data, recipe: Recipe) -> dict[str, float]:
    """Loss and accuracy on the first held-out sequences, in whole batches, by the model's own
    methods.
    """
    graphdef, params = nnx.split(model)
    count = max(min(recipe.tests, len(data.tokens)) // recipe.batch, 1)
    cuts = [slice(n * recipe.batch, (n + 1) * recipe.batch) for n in range(count)]
    score = _quick_score if data.tokens.shape[1] <= SHORT else _score
    scores = [score(graphdef, params, data.tokens[cut], data.labels[cut]) for cut in cuts]
    return {
        "loss": float(np.mean([s[0] for s in scores])),
        "accuracy": float(np.mean([s[1] for s in scores])),
    }


def with_methods(model: Transformer, methods: Sequence[Any]) -> Transformer:
    """A copy of the model with other methods."""
    copy = nnx.merge(*nnx.split(model))
    copy.set_methods(methods)
    return copy


def compare(model: Transformer, data: Data) -> dict[str, float]:
    """The adapters' gradient by the model's methods against the exact one, as one vector: cosine,
    relative error.
    """
    flat = []
    gradient = _quick_gradients if data.tokens.shape[1] <= SHORT else gradients
    for each in (model, with_methods(model, [EXACT] * len(model.blocks))):
        parts = gradient(*nnx.split(each, ADAPTERS, ...), *data)
        flat.append(
            np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(parts)])
        )
    got, want = flat
    size = max(float(np.linalg.norm(want)), 1e-300)
    return {
        "cosine": float(got @ want / max(float(np.linalg.norm(got)) * size, 1e-300)),
        "error": float(np.linalg.norm(got - want) / size),
    }


def train(
    model: Transformer,
    task: Task,
    recipe: Recipe,
    *,
    what: Any = ADAPTERS,
    watch: bool = False,
    rechoose: Callable[[Transformer, Data], Sequence[Any]] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train the parameters that the filter `what` picks, in place; the rest is not touched. Returns
    the history.

    "loss", "seconds": of every step, compiling and evaluation apart. "steps": where it was
    evaluated, the last too, and there "test_loss", "accuracy", "methods" (as text) and, with
    `watch`, "cosine" and "error" of the gradient against the exact one on the next batch. rechoose:
    (model, batch) -> methods, asked wherever the run is evaluated. "temporary": the most bytes that
    a step asks for. folder: where the run is kept at each evaluation, before it; a run that was
    killed goes on from there to the same losses. The folder belongs to this model, task and recipe
    alone.
    """
    graphdef, trained, frozen = nnx.split(model, what, ...)
    state = optimiser(recipe).init(trained)
    used = {}
    history: dict[str, Any] = {
        k: [] for k in ("loss", "seconds", "steps", "test_loss", "accuracy", "methods")
    }
    history |= {"cosine": [], "error": []} if watch else {}
    start, (trained, state), history = checkpoints.restore(folder, (trained, state), history)
    hidden = recipe.steps < SHOWN or not sys.stdout.isatty()
    for step in track(range(start, recipe.steps + 1), "training", disable=hidden, transient=True):
        data = tasks.batch(task.train, recipe.batch, recipe.seed, step)
        if step % recipe.every == 0 or step == recipe.steps:
            checkpoints.keep(folder, step, (trained, state), history)
            nnx.update(model, trained)
            if rechoose is not None:
                model.set_methods(rechoose(model, data))
                graphdef = nnx.split(model, what, ...)[0]
            _note(history, step, model, task, recipe, data if watch else None)
        if step < recipe.steps:
            run = used[graphdef] = compiled_step(recipe, graphdef, trained, frozen, state, *data)
            began = time.perf_counter()
            trained, state, value = jax.block_until_ready(run(trained, frozen, state, *data))
            history["seconds"].append(time.perf_counter() - began)
            history["loss"].append(float(value))
    memory = [timing.temporary_bytes(run) for run in used.values()]
    return history | {"temporary": max((m for m in memory if m), default=None)}


def _note(
    history: dict, step: int, model: Transformer, task: Task, recipe: Recipe, data: Data | None
) -> None:
    """Adds an evaluation to the history, and a comparison of gradients where there is a batch for
    it.
    """
    scores = evaluate(model, task.test, recipe)
    noted = {"steps": step, "test_loss": scores["loss"], "accuracy": scores["accuracy"]}
    noted["methods"] = [str(method) for method in model.methods]
    for name, value in (noted | (compare(model, data) if data is not None else {})).items():
        history[name].append(value)


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
        task = tasks.load(self.task, self.length, "source", self.words)
        return Shape(task.vocabulary, task.classes, self.length, **dict(self.options))


def pretrained(base: Base, lora: LoRA, cache: Path, *, seed: int = 0) -> Transformer:
    """The base with fresh adapters of that seed, pretrained on its task's source and kept under
    `cache`, by content.

    Every parameter but the adapters is trained. Processes that want the same base at once each make
    it; one is kept.
    """
    shape = base.shape()
    # the texts are those of the Python that runs
    identity = dataclasses.asdict(base) | {
        "method": str(base.method),
        "python": list(sys.version_info[:2]),
    }
    folder = cache / store.key("base", VERSION, {}, identity)
    model = Transformer(shape, lora, rngs=nnx.Rngs(seed))
    params = nnx.state(model, BASE)
    if not folder.exists():
        fresh = Transformer(
            shape, LoRA(adapt=NAMES), rngs=nnx.Rngs(base.recipe.seed)
        )  # the same whoever asks first
        fresh.set_methods([base.method] * shape.layers)
        train(
            fresh, tasks.load(base.task, base.length, "source", base.words), base.recipe, what=BASE
        )
        checkpoints.publish(folder, nnx.state(fresh, BASE))
    nnx.update(model, checkpoints.restore(folder, params, {})[1])
    return model


def stretch(model: Transformer, length: int) -> None:
    """Makes a model of square images read `length` pixels: its positions interpolated on the grid,
    in place.
    """
    old, new = (math.isqrt(n) for n in (model.shape.length, length))
    grid = model.position[...].reshape(old, old, -1)
    finer = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear")
    model.position = nnx.Param(finer.reshape(new * new, -1))
    model.shape = dataclasses.replace(model.shape, length=length)


def forget(folder: Path) -> None:
    """Drops what `train` kept of a run that is over."""
    shutil.rmtree(folder, ignore_errors=True)
