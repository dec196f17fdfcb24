"""A method for each layer, by its time and by its gradient's error against the mini-batch's noise."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lora_limits.instruments import timing
from lora_limits.nn import per_layer
from lora_limits.nn.layered import Layered
from lora_limits.training import batches, gradient_noise, loop
from lora_limits.training.batches import Data

WATCHED = 8  # sequences, of the training part, that noise and error are measured on,
WATCHED_TOKENS = 8192  # or fewer, of no more tokens than this together,
COMPARED = 2  # but these, that layers are compared on
SHARE = 0.5  # of the noise of a batch: what a layer's error may be
REPEATS = 5  # of whatever is timed, however long it takes: training takes longer


def first_of(data: Data) -> Data:
    """The sequences that noise and error are measured on: fewer of long ones, whose gradients by
    both methods would take longer than the training.
    """
    within = WATCHED_TOKENS // data.tokens.shape[1]
    return batches.first(data, min(max(within, COMPARED), WATCHED))


def watched(model: Layered, exact: Any, data: Data, batch: int) -> dict[str, float]:
    """{"error", "noise"} of the adapters' gradient by the model's methods, relative to its norm.

    error: root mean square over batches of that size; noise: that of exact gradients about their
    mean. Both from sequences one by one, with moments free of the bias of so few.
    """
    exact_model = loop.with_methods(model, [exact] * len(model.blocks))
    rows = gradient_noise.per_example(exact_model, data, 1)
    wrong = gradient_noise.moments(gradient_noise.per_example(model, data, 1) - rows)
    size = np.linalg.norm(rows.mean(0))
    squared = max(wrong["mean"], 0.0) + wrong["spread"] / batch
    noise = gradient_noise.moments(rows)["spread"] / batch
    return {"error": float(np.sqrt(squared) / size), "noise": float(np.sqrt(noise) / size)}


def choose(
    model: Layered,
    data: Data,
    batch: int,
    exact: Mapping[str, Any],
    approximate: Mapping[str, Any],
    forced: str | None = None,
) -> dict[str, Any]:
    """{"exact": the fastest layout, "seconds": of a layer by each method, "layers": for each layer
    its "method", its "noise" and the "errors" of the methods}, all JSON.

    A layer takes the fastest approximate method whose error is within SHARE of its noise, if it is
    faster than exact; with `forced`, every layer takes that. Errors are of the layer's own
    adapters, with the cotangents of exact attention, and as the noise relative to their gradient.
    The model is left with exact methods.
    """
    seconds = _layer_seconds(model, data, batch, {**exact, **approximate})
    best = min(exact, key=lambda name: seconds[name]["seconds"])
    model.set_methods([exact[best]] * len(model.blocks))
    rows = gradient_noise.per_example(model, data, 1)
    few = batches.first(data, COMPARED)
    errors = per_layer.gradient_errors(model, *few, loop.loss, methods=tuple(approximate.values()))
    layers = []
    order = sorted(approximate, key=lambda name: seconds[name]["seconds"])
    for columns, found in zip(_columns(model), errors, strict=True):
        own = rows[:, columns]
        size = np.linalg.norm(own[:COMPARED].mean(0))
        noise = float(np.sqrt(gradient_noise.moments(own)["spread"] / batch) / size)
        by_name = dict(zip(approximate, found, strict=True))
        within = (
            name
            for name in order
            if by_name[name] <= SHARE * noise
            and seconds[name]["seconds"] < seconds[best]["seconds"]
        )
        method = forced or next(within, best)
        layers.append({"method": method, "noise": noise, "errors": by_name})
    return {"exact": best, "seconds": seconds, "layers": layers}


def _columns(model: Layered) -> list[np.ndarray]:
    """Of each layer, which numbers of a flat gradient are of its attention's adapters."""
    found: list[list[np.ndarray]] = [[] for _ in model.blocks]
    start = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, loop.ADAPTERS)):
        keys: list[Any] = [getattr(step, "key", None) for step in path]
        if "attention" in keys:
            place = keys[keys.index("blocks") + 1]
            found[int(place)].append(np.arange(start, start + leaf.size))
        start += leaf.size
    return [np.concatenate(parts) for parts in found]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _layer_gradient(
    graphdef: Any,
    adapters: Any,
    rest: Any,
    x: Float[Array, "b l d_model"],
    method: Any,
    cotangent: Float[Array, "b l heads width"],
) -> Any:
    """What a step asks of a layer's attention: gradients of its adapters and of what it reads."""

    def attend(adapters: Any, x: Float[Array, "b l d_model"]) -> Float[Array, "b l heads width"]:
        return nnx.merge(graphdef, adapters, rest).attend(x, method)

    return jax.vjp(attend, adapters, x)[1](cotangent)


def _layer_seconds(
    model: Layered, data: Data, batch: int, methods: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """The time of one layer's attention by every method, by turns; on random tokens."""
    layer = model.blocks[0].attention
    length = data.tokens.shape[1]
    keys = jax.random.split(jax.random.key(0))
    dtype = model.embedding[...].dtype
    x = jax.random.normal(keys[0], (batch, length, model.embedding[...].shape[1]), dtype)
    cotangent = jax.random.normal(keys[1], (batch, length, layer.heads, layer.width), dtype)
    split = nnx.split(layer, nnx.LoRAParam, ...)
    calls = {
        name: functools.partial(_layer_gradient, *split, x, method, cotangent)
        for name, method in methods.items()
    }
    return timing.interleaved(calls, repeats=REPEATS, max_seconds=math.inf)


def methods_of(choice: Mapping[str, Any], known: Mapping[str, Any]) -> Sequence[Any]:
    """The methods of the layers of a choice, by name."""
    return [known[layer["method"]] for layer in choice["layers"]]
