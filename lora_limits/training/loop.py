"""Pretraining and fine-tuning: one loop, resumable, its gradient held against the exact one.

A model is `Layered`; its methods give the gradients. Nothing here knows what is learnt: data
are tokens and labels (`batches`).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.progress import track

from lora_limits.gradients.methods import Exact
from lora_limits.instruments import timing
from lora_limits.instruments.compiling import jit_for
from lora_limits.linalg import AnyArray
from lora_limits.nn.layered import Layered
from lora_limits.training import batches, checkpoints
from lora_limits.training.batches import Data, Splits

ADAPTERS = nnx.LoRAParam
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
EXACT = Exact(512)
SHOWN = 200  # steps from which a run shows its progress on a terminal
TINY = 1e-300  # what a norm of 0 is divided by
NOTED = ("loss", "seconds", "steps", "test_loss", "accuracy", "methods")  # in the history


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Adam, gradients clipped to norm 1, a tenth of the steps to warm up, then a cosine to 0."""

    steps: int
    batch: int = 16
    rate: float = 3e-3  # the largest
    seed: int = 0  # of the order of the data
    every: int = 50  # steps between evaluations
    tests: int = 256  # held-out sequences, the first, of an evaluation


def optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """The recipe's optimiser and its schedule."""
    warm = max(recipe.steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, warm, max(recipe.steps, warm + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def loss(
    logits: Float[Array, "*batch classes"], labels: Int[AnyArray, "*batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy: *batch is (B,) for classes and (B, L) for next tokens."""
    log_shares = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -log_shares.mean()


def loss_of(
    graphdef: Any,
    trained: Any,
    frozen: Any,
    tokens: Int[AnyArray, "b l"],
    labels: Int[AnyArray, "b ..."],
) -> Float[Array, ""]:
    """The loss of a split model: `nnx.split(model, what, ...)` gives its first three arguments."""
    return loss(nnx.merge(graphdef, trained, frozen)(tokens), labels)


_gradient_of = jax.grad(loss_of, argnums=1)
gradients = jax.jit(_gradient_of, static_argnums=0)


_compiled: dict[Any, Any] = {}


def compiled_step(recipe: Recipe, graphdef: Any, *args: Any) -> Any:
    """The executable (trained, frozen, state, tokens, labels) -> (trained, state, loss).

    Compiled once in a process for each graphdef, which holds the methods, each optimiser, and each
    shape of `args`, which are such as it is called with.
    """

    def step(trained, frozen, state, tokens, labels):
        value_and_gradient = jax.value_and_grad(functools.partial(loss_of, graphdef))
        value, grads = value_and_gradient(trained, frozen, tokens, labels)
        # optax multiplies counts by floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser(recipe).update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    # Not by jit's own cache, which would keep no handle on the memory that a step asks for.
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(args))
    key = (recipe.steps, recipe.rate, graphdef, jax.tree.structure(args), shapes)
    if key not in _compiled:
        _compiled[key] = jax.jit(step).lower(*args).compile()
    return _compiled[key]


def _scores_of(
    graphdef: Any, params: Any, tokens: Int[AnyArray, "b l"], labels: Int[AnyArray, "b ..."]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """(loss, accuracy) of each sequence."""
    logits = nnx.merge(graphdef, params)(tokens)
    right = logits.argmax(-1).astype(labels.dtype) == labels
    return jax.vmap(loss)(logits, labels), right.reshape(len(tokens), -1).mean(1)


def scores(model: Layered, data: Data, recipe: Recipe) -> dict[str, Float[np.ndarray, " n"]]:
    """Loss and accuracy of each of the first sequences, in whole batches, by the model's methods."""
    graphdef, params = nnx.split(model)
    count = max(min(recipe.tests, len(data.tokens)) // recipe.batch, 1)
    # Whole batches have one shape, and so one program.
    cuts = [slice(n * recipe.batch, (n + 1) * recipe.batch) for n in range(count)]
    score = jit_for(_scores_of, data.tokens.shape[1], params)
    found = [score(graphdef, params, data.tokens[cut], data.labels[cut]) for cut in cuts]
    losses, rights = (np.concatenate(part) for part in zip(*found, strict=True))
    return {"loss": losses, "accuracy": rights}


def evaluate(model: Layered, data: Data, recipe: Recipe) -> dict[str, float]:
    """The means of `scores`."""
    return {name: float(each.mean()) for name, each in scores(model, data, recipe).items()}


def with_methods(model: Layered, methods: Sequence[Any]) -> Layered:
    """A copy of the model with other methods."""
    copy = nnx.merge(*nnx.split(model))
    copy.set_methods(methods)
    return copy


def compare(model: Layered, data: Data) -> dict[str, float]:
    """Cosine and relative error of the adapters' gradient, as one vector, against the exact one."""
    gradient = jit_for(_gradient_of, data.tokens.shape[1], nnx.state(model))

    def flat(model: Layered) -> np.ndarray:
        parts = gradient(*nnx.split(model, ADAPTERS, ...), *data)
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(parts)]
        return np.concatenate([leaf.ravel() for leaf in leaves])

    got = flat(model)
    want = flat(with_methods(model, [EXACT] * len(model.blocks)))
    # A gradient of zero has a finite error and cosine too.
    size = max(float(np.linalg.norm(want)), TINY)
    product = max(float(np.linalg.norm(got)) * size, TINY)
    return {
        "cosine": float(got @ want / product),
        "error": float(np.linalg.norm(got - want) / size),
    }


def train(
    model: Layered,
    task: Splits,
    recipe: Recipe,
    *,
    what: Any = ADAPTERS,
    watch: Callable[[Layered, Data], Mapping[str, float]] | None = None,
    rechoose: Callable[[Layered, Data], Sequence[Any]] | None = None,
    folder: Path | None = None,
    told: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains the parameters that the filter `what` picks, in place; returns the history.

    rechoose: (model, batch) -> methods, asked wherever the run is evaluated. folder: where the run
    is kept at each evaluation, before it; a run that was killed goes on from there to the same
    losses. The folder belongs to this model, task and recipe alone. told: called with the number of
    steps done and the history after each, in place of a bar of progress.

    The history: "loss", "seconds": of every step, compiling and evaluation apart. "steps": where it
    was evaluated, the last too, and there "test_loss", "accuracy", "methods" (as text) and what
    `watch`, `compare` for one, says of the model and the next batch.
    "temporary": the most bytes that a step asks for.
    """
    graphdef, trained, frozen = nnx.split(model, what, ...)
    state = optimiser(recipe).init(trained)
    used = {}
    history: dict[str, Any] = {name: [] for name in NOTED}
    start, (trained, state), history = checkpoints.restore(folder, (trained, state), history)
    hidden = told is not None or recipe.steps < SHOWN or not sys.stdout.isatty()
    for step in track(range(start, recipe.steps + 1), "training", disable=hidden, transient=True):
        data = batches.batch(task.train, recipe.batch, recipe.seed, step)
        if step % recipe.every == 0 or step == recipe.steps:
            # Kept before it is evaluated: a run that is resumed evaluates this step again.
            checkpoints.keep(folder, step, (trained, state), history)
            nnx.update(model, trained)
            if rechoose is not None:
                # The methods are part of graphdef, so a new choice is a new program.
                model.set_methods(rechoose(model, data))
                graphdef = nnx.split(model, what, ...)[0]
            _note(history, step, model, task, recipe)
            for name, value in (watch(model, data) if watch else {}).items():
                history.setdefault(name, []).append(value)
        if step < recipe.steps:
            run = used[graphdef] = compiled_step(recipe, graphdef, trained, frozen, state, *data)
            began = time.perf_counter()
            trained, state, value = jax.block_until_ready(run(trained, frozen, state, *data))
            history["seconds"].append(time.perf_counter() - began)
            history["loss"].append(float(value))
            if told is not None:
                told(step + 1, history)
    memory = [timing.temporary_bytes(run) for run in used.values()]
    return history | {"temporary": max((m for m in memory if m), default=None)}


def _note(history: dict[str, Any], step: int, model: Layered, task: Splits, recipe: Recipe) -> None:
    """Adds an evaluation to the history."""
    found = evaluate(model, task.test, recipe)
    history["steps"].append(step)
    history["test_loss"].append(found["loss"])
    history["accuracy"].append(found["accuracy"])
    history["methods"].append([str(method) for method in model.methods])
