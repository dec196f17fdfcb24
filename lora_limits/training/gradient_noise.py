"""Gradients of the adapters example by example: what a mini-batch adds as noise, and a method as
error.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from lora_limits.instruments.compiling import jit_for
from lora_limits.training import loop
from lora_limits.training.batches import Data

CHUNK = 16  # examples at a time, where nobody asks for fewer


def _one(graphdef: Any, adapters: Any, frozen: Any, tokens: Any, labels: Any) -> list[Any]:
    loss = functools.partial(loop.loss_of, graphdef)
    grads = jax.grad(loss)(adapters, frozen, tokens[None], labels[None])
    return [leaf.reshape(-1) for leaf in jax.tree.leaves(grads)]


def _many(graphdef: Any, adapters: Any, frozen: Any, tokens: Any, labels: Any) -> list[Any]:
    """Gradients of every example."""
    return jax.vmap(functools.partial(_one, graphdef, adapters, frozen))(tokens, labels)


def per_example(model: Any, data: Data, chunk: int = CHUNK) -> np.ndarray:
    """The gradient of each example's own loss by the model's methods: (examples, numbers in the
    adapters), float64.

    Whole chunks of examples, the rest dropped; time and memory of a training step for each chunk.
    """
    parts = nnx.split(model, loop.ADAPTERS, ...)
    run = jit_for(_many, data.tokens.shape[1], parts[1:])
    rows = []
    size = min(chunk, len(data.tokens))
    for start in range(0, len(data.tokens) - size + 1, size):
        cut = slice(start, start + size)
        leaves = run(*parts, data.tokens[cut], data.labels[cut])
        rows.append(np.concatenate([np.asarray(leaf, np.float64) for leaf in leaves], 1))
    return np.concatenate(rows)


def moments(gradients: np.ndarray) -> dict[str, float]:
    """{"mean": || E g ||^2, "spread": tr Cov g} of one example's g, both unbiased; "mean" may come
    out below 0.
    """
    spread = float(gradients.var(0, ddof=1).sum())
    # The squared mean of n draws is too large by the noise that is left in it.
    mean = float((gradients.mean(0) ** 2).sum()) - spread / len(gradients)
    return {"mean": mean, "spread": spread}


def compare(model: Any, data: Data, methods: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Moments of the exact gradients under "exact", and for each method those of its error, beside
    its relative error.

    A batch of b then has the squared noise spread / b, and the squared error mean + spread / b.
    "relative": the norm of the error over that of the exact gradient, both of all the data as one
    batch. NaN where a method's gradient is.
    """
    layers = len(model.blocks)
    # The model's own methods do not matter here: copies carry those compared.
    exact = per_example(loop.with_methods(model, [loop.EXACT] * layers), data)
    out = {"exact": moments(exact)}
    for name, method in methods.items():
        error = per_example(loop.with_methods(model, [method] * layers), data) - exact
        relative = np.linalg.norm(error.mean(0)) / np.linalg.norm(exact.mean(0))
        out[name] = moments(error) | {"relative": float(relative)}
    return out
