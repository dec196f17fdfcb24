"""Heads of a causal model: their norms and outliers, and some of them as problems without a mask, a
block of queries on keys that all of them see.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_limits as ll
from lora_limits.instruments.comparing import softmax
from lora_limits.instruments.compiling import quick_jit
from lora_limits.nn import per_layer
from lora_limits.nn.transformer import Transformer
from lora_limits.problem import NAMES
from lora_limits.training import loop
from lora_limits.training.batches import Data


def look(model: Transformer, data: Data, count: int) -> tuple[dict[str, Any], list[ll.LoRAProblem]]:
    """(norms and outliers, the problems of `count` heads of every layer on the first sequence).

    "gamma", "score": Gamma / sqrt(ln L) and R / ln L of every head, layer by layer. "largest",
    "kurtosis": of what the attention layers put out.
    """
    graphdef, params = nnx.split(model)

    @quick_jit
    def run(params, tokens, labels):
        model = nnx.merge(graphdef, params)
        loss = functools.partial(loop.loss, labels=labels)
        read, cotangents = per_layer.cotangents(model, tokens, loss)
        layers = [block.attention for block in model.blocks]
        written = [layer(x) for layer, x in zip(layers, read, strict=True)]
        heads = [per_layer.problem_of(layer, x[0]) for layer, x in zip(layers, read, strict=True)]
        return per_layer.norms(model, tokens), written, heads, [c[0] for c in cotangents]

    reports, written, heads, cotangents = jax.tree.map(np.asarray, run(params, *data))
    activations = np.stack(written).astype(float)
    centred = activations - activations.mean()
    variance = (centred**2).mean()
    # Heads evenly spread over the layer; fewer where it has fewer.
    pick = np.unique(np.linspace(0, model.shape.heads - 1, count).round().astype(int))
    problems = []
    for stacked, cotangent in zip(heads, cotangents, strict=True):
        for n in pick:
            head = jax.tree.map(lambda z, n=n: z[n], stacked)
            problems.append(block_problem(head, cotangent[:, n]))
    found = {
        "gamma": [np.asarray(report.gamma_ratio).ravel().tolist() for report in reports],
        "score": [np.asarray(report.score_ratio).ravel().tolist() for report in reports],
        "largest": float(np.abs(activations).max()),
        "kurtosis": float((centred**4).mean() / variance**2),
    }
    return found, problems


def block_problem(problem: ll.LoRAProblem, cotangent: np.ndarray) -> ll.LoRAProblem:
    """The second half's queries on the keys of the first half and one more, which all of them see:
    no mask is needed.

    Of softmax_1 the one more is its key of zeros. Tokens are turned to coordinates of their own
    span, which turns dl/dB and changes no norm: one shape for all models. The residual is the
    head's own cotangent, scaled to the size of its output. In float32, made in float64.
    """
    half = problem.x_query.shape[0] // 2
    x = np.asarray(problem.x_query[half:], float)
    keys = np.asarray(problem.x_key[: half + 1], float)
    # Tokens of the block span at most as many dimensions as there are of them.
    span = np.linalg.qr(np.concatenate([x, keys]).T)[0]
    x = x @ span
    keys = keys @ span
    scale = float(problem.scale)
    beta = float(problem.beta)
    weights = {}
    adapters = {}
    rows = {}
    for name, tokens in zip(NAMES, (x, keys, keys), strict=True):
        weights[name] = span.T @ np.asarray(getattr(problem.weights, name), float)
        a = np.asarray(problem.adapters[name].a, float)
        b = span.T @ np.asarray(problem.adapters[name].b, float)
        adapters[name] = ll.Adapter(a, b)
        rows[name] = tokens @ (weights[name] + scale * b @ a)
    out = softmax(beta * rows["query"] @ rows["key"].T) @ rows["value"]
    c = np.asarray(cotangent[half:], float)
    # The residual out - target is then the scaled cotangent.
    target = out - c * np.linalg.norm(out) / np.linalg.norm(c)
    return ll.LoRAProblem(
        *_float32(x, keys, keys, target),
        weights=ll.AttentionWeights(**_float32(weights)),
        adapters=_float32(adapters),
        scale=_float32(scale),
        beta=_float32(beta),
    )


def _float32(*trees: Any) -> Any:
    """The trees with arrays of float32 for leaves; one tree alone as itself."""
    single = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), trees)
    return single if len(trees) > 1 else single[0]
