"""What norms and certificates say of each layer of a model as it is: its heads taken as LoRA
problems on some held-out sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_limits as ll
from lora_limits.instruments.compiling import quick_jit
from lora_limits.nn import per_layer
from lora_limits.nn.lora import LoRAAttention
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import loop
from lora_limits.training.batches import Data

NORMS = ("gamma", "score")


def watcher(
    model: Transformer, data: Data, degrees: tuple[int, ...]
) -> Callable[[], list[dict[str, Any]]]:
    """A function that says what `inspect` measures of each layer as it is, over its heads and the
    sequences.

    Norms: the largest. Certificates of each degree: medians, and the smallest normaliser.
    """

    def look() -> list[dict[str, Any]]:
        layers = _problems()(*nnx.split(model), *data)
        return [_summary(_inspector(degrees)(problem), degrees) for problem in layers]

    return look


@functools.cache
def _problems() -> Callable[..., list[ll.LoRAProblem]]:
    """(graphdef, params, tokens, labels) -> each layer's problems, over (sequences, heads)."""

    def problems(graphdef, params, tokens, labels):
        # Certificates are of float64, whatever the training was in.
        wide = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64), params))
        loss = functools.partial(loop.loss, labels=labels)
        read, cotangents = per_layer.cotangents(wide, tokens, loss)
        make = normalised_problem if wide.shape.normalised else adapted_problem
        layers = zip(wide.blocks, read, cotangents, strict=True)
        return [
            jax.vmap(functools.partial(make, block.attention))(x, cotangent)
            for block, x, cotangent in layers
        ]

    return quick_jit(problems, static_argnums=0)


def _summary(found: dict[str, Any], degrees: tuple[int, ...]) -> dict[str, float]:
    """One number of each quantity, of arrays over (sequences, heads)."""
    found = jax.tree.map(np.asarray, found)
    row = {name: float(found[name].max()) for name in (*NORMS, "update")}
    row["median score"] = float(np.median(found["score"]))
    for g in degrees:
        row[f"bound {g}"] = float(np.median(found[f"bound {g}"]))
        row[f"error {g}"] = float(np.median(found[f"error {g}"]))
        row[f"normaliser {g}"] = float(found[f"normaliser {g}"].min())
    return row


@functools.cache
def _inspector(degrees: tuple[int, ...]) -> Callable[[Any], dict[str, Any]]:
    """`inspect` over (sequences, heads), compiled once for each rank."""
    return quick_jit(jax.vmap(jax.vmap(lambda problem: inspect(problem, degrees))))


def adapted_problem(layer: LoRAAttention, x: jax.Array, cotangent: jax.Array) -> ll.LoRAProblem:
    """The layer's heads on one sequence with a residual that has the size of their outputs, as it
    has for Y = 0.
    """
    return per_layer.problem_of(layer, x, sized(layer, x, cotangent))


def normalised_problem(layer: LoRAAttention, x: jax.Array, cotangent: jax.Array) -> ll.LoRAProblem:
    """The same where no W gives the scores: adapters of the normalised rows of Q and K, and of V,
    at A = 0, B = 1.
    """

    def head(q, k, v, target):
        width = q.shape[-1]
        eye = jnp.eye(width, dtype=q.dtype)
        weights = ll.AttentionWeights(query=eye, key=eye, value=eye)
        adapters = {name: ll.Adapter(jnp.zeros_like(eye), eye) for name in NAMES}
        scale, beta = (jnp.asarray(value, q.dtype) for value in (1.0, width**-0.5))
        return ll.LoRAProblem(
            q, k, v, target, weights=weights, adapters=adapters, scale=scale, beta=beta
        )

    # Attention's output less the cotangent: the loss 1/2 |out - target|^2 then has that cotangent.
    target = layer.attend(x[None], per_layer.EXACT)[0] - sized(layer, x, cotangent)
    q, k, v = (rows[0] for rows in layer.rows(x[None]))
    return jax.vmap(head, 1)(q, k, v, target)


def sized(layer: LoRAAttention, x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The cotangent (L, heads, width) of each head scaled to the Frobenius norm of its output."""
    out = layer.attend(x[None], per_layer.EXACT)[0]
    size, own = (jnp.sqrt((z**2).sum((0, 2), keepdims=True)) for z in (out, cotangent))
    return cotangent * size / jnp.where(own > 0, own, 1)


def inspect(problem: ll.LoRAProblem, degrees: tuple[int, ...]) -> dict[str, jax.Array]:
    """Gamma / sqrt(ln L), R / ln L, the adapters' share, and for each degree bound, error and
    normaliser.

    Bounds and errors are relative to the max norm of the exact array, the worst of the arrays whose
    gradient is not 0.
    """
    report = ll.norm_report(problem)
    update = jnp.maximum(report.query_update, report.key_update)
    out = {"gamma": report.gamma_ratio, "score": report.score_ratio, "update": update}
    exact = jax.tree.leaves(ll.gradient(problem, ll.Exact()).gradient)
    sizes = jnp.stack([jnp.abs(x).max() for x in exact])

    def worst(values):
        # Arrays whose gradient vanishes have no relative error: A's is 0 as long as B is.
        relative = jnp.stack(values) / jnp.where(sizes > 0, sizes, 1)
        return jnp.where(sizes > 0, relative, 0).max()

    for g in degrees:
        result = ll.gradient(problem, ll.Polynomial(g))
        pairs = zip(jax.tree.leaves(result.gradient), exact, strict=True)
        out[f"bound {g}"] = worst(jax.tree.leaves(result.bound))
        out[f"error {g}"] = worst([jnp.abs(a - b).max() for a, b in pairs])
        out[f"normaliser {g}"] = jnp.asarray(result.normaliser)
    return out
