"""A model's attention layers as LoRA problems, one for each head: their norms, and a method for
each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_limits.gradients.methods import Exact
from lora_limits.nn.lora import LoRAAttention
from lora_limits.nn.transformer import Layered
from lora_limits.norms import NormReport, norm_report
from lora_limits.problem import NAMES, Adapter, AttentionWeights, LoRAProblem

EXACT = Exact(512)


def problem_of(
    layer: LoRAAttention, x: jax.Array, cotangent: jax.Array | None = None
) -> LoRAProblem:
    """The layer's heads on one sequence, as LoRAProblems stacked along a first axis: vmap over it.

    Y = f V - cotangent, so that the gradient of 1/2 || f V - Y ||^2 is the vector-Jacobian product
    of the heads with the cotangent; without one Y is what the layer's attention puts out, f V where
    it is not causal. Gradients are linear in the cotangent: scale one that is tiny beside f V, or
    float32 loses it. A head's B is the layer's, its A the layer's columns of that head: gradients
    of B add up over heads. Biases are a column of ones in x. softmax_1: a key of zeros in front.
    x: (L, d_model); cotangent: (L, heads, width). Time and memory of exact tiled attention.
    Raises ValueError for a layer with query-key normalisation (no W gives its scores), without
    adapters, and for a cotangent of a causal layer, as a LoRAProblem has no mask.
    """
    if layer.normalised:
        raise ValueError(
            "layer: got query-key normalisation, expected scores that are x W_Q W_K^T x^T"
        )
    if layer.is_causal and cotangent is not None:
        raise ValueError(
            "cotangent: got one for a causal layer, expected none: a LoRAProblem has no mask"
        )
    weights, adapters, scale = _weights(layer)
    x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1)
    keys = jnp.pad(x, ((1, 0), (0, 0))) if layer.softmax_1 else x
    target = layer.attend(x[None, :, :-1], EXACT)[0]
    target = target if cotangent is None else target - cotangent

    def head(weights, a, target):
        adapters_of = {name: Adapter(a[name], adapters[name]) for name in a}
        arrays = (jnp.asarray(value, x.dtype) for value in (scale, layer.width**-0.5))
        scale_, beta = arrays
        return LoRAProblem(
            x,
            keys,
            keys,
            target,
            weights=AttentionWeights(**weights),
            adapters=adapters_of,
            scale=scale_,
            beta=beta,
        )

    a = {name: _by_head(getattr(layer, name).a[...], layer.heads) for name in adapters}
    return jax.vmap(head)(weights, a, target.transpose(1, 0, 2))


def _by_head(matrix: jax.Array, heads: int) -> jax.Array:
    """(n, heads * width) -> (heads, n, width)."""
    return matrix.reshape(matrix.shape[0], heads, -1).transpose(1, 0, 2)


def _weights(layer: LoRAAttention) -> tuple[dict[str, jax.Array], dict[str, jax.Array], float]:
    """({name: W with its bias as last row, by head}, {name: B with a row of zeros}, scale)."""
    weights = {}
    b = {}
    for name in NAMES:
        projection = getattr(layer, name)
        kernel = projection.kernel[...]
        last = jnp.zeros_like(kernel[:1]) if projection.bias is None else projection.bias[...][None]
        weights[name] = _by_head(jnp.concatenate([kernel, last]), layer.heads)
        if projection.b is not None:
            b[name] = jnp.pad(projection.b[...], ((0, 1), (0, 0)))
    return weights, b, getattr(layer, layer.adapt[0]).scale


def _row_problems(layer: LoRAAttention, x: jax.Array) -> LoRAProblem:
    """As problem_of, for norms alone: starts from the rows of Q, K and V, whatever made them, with
    identity weights.
    """

    def head(q, k, v):
        one = jnp.eye(layer.width, dtype=q.dtype)
        zero = jnp.zeros((1, layer.width), q.dtype)
        weights = AttentionWeights(query=one, key=one, value=one)
        adapters = {"value": Adapter(zero, zero.T)}
        scale, beta = (jnp.asarray(value, q.dtype) for value in (1.0, layer.width**-0.5))
        return LoRAProblem(q, k, v, v, weights=weights, adapters=adapters, scale=scale, beta=beta)

    return jax.vmap(head, 1)(*(rows[0] for rows in layer.rows(x[None])))


def norms(model: Layered, tokens: jax.Array) -> tuple[NormReport, ...]:
    """Gamma, R and the other norms of every layer: one report for each, its entries (B, heads).

    Of x W_Q and x W_K as they are; after the normalisation where there is one, and then the norms
    of the updates are 0 and those of Theorem A.1 are of the rows. A causal head is reported as if
    every query saw every key. jit applies. O(B L d_model heads width) time, and the time of the
    model's own forward.
    """

    def reports(layer, x):
        make = _row_problems if layer.normalised else problem_of
        return jax.vmap(lambda x: jax.vmap(norm_report)(make(layer, x)))(x)

    return tuple(
        reports(block.attention, x)
        for block, x in zip(model.blocks, model.trace(tokens)[1], strict=True)
    )


def cotangents(
    model: Layered, tokens: jax.Array, loss: Callable[[jax.Array], jax.Array]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """(x, dloss/d(head outputs)) of every layer, by the model's methods: (B, L, d_model), (B, L,
    heads, width) each.
    """
    dtype = model.embedding[...].dtype
    probes = [
        jnp.zeros((*tokens.shape, b.attention.heads, b.attention.width), dtype)
        for b in model.blocks
    ]

    def run(probes):
        logits, read = model.trace(tokens, probes)
        return loss(logits), read

    grads, read = jax.grad(run, has_aux=True)(probes)
    return read, tuple(grads)


def adapter_gradient(layer: LoRAAttention, x: jax.Array, cotangent: jax.Array, method: Any) -> Any:
    """The layer's own adapters' gradient by a method, from what it reads and the cotangent of its
    heads' outputs.
    """
    graphdef, adapters, rest = nnx.split(layer, nnx.LoRAParam, ...)
    back = jax.vjp(lambda a: nnx.merge(graphdef, a, rest).attend(x, method), adapters)[1]
    return back(cotangent)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _gradient(
    graphdef: Any, params: Any, x: jax.Array, cotangent: jax.Array, method: Any
) -> jax.Array:
    leaves = jax.tree.leaves(adapter_gradient(nnx.merge(graphdef, params), x, cotangent, method))
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


@functools.partial(jax.jit, static_argnums=(0, 4))
def _cotangents(graphdef: Any, params: Any, tokens: jax.Array, labels: jax.Array, loss: Any) -> Any:
    return cotangents(nnx.merge(graphdef, params), tokens, lambda logits: loss(logits, labels))


def gradient_errors(
    model: Layered,
    tokens: jax.Array,
    labels: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    methods: Sequence[Any],
) -> list[list[float]]:
    """|| g - exact || / || exact || of each layer's adapters by each method: a list for each layer.

    On the sample given, with the cotangents that reach the layer by the model's present methods.
    One compilation for each method, for all layers and every later call. Each call costs the
    sample's attention gradients by each method and by Exact.
    """
    graphdef, params = nnx.split(model)
    read, cots = _cotangents(graphdef, params, tokens, labels, loss)
    out = []
    for block, x, cotangent in zip(model.blocks, read, cots, strict=True):
        layer = nnx.merge(*nnx.split(block.attention))
        layer.method = (
            EXACT  # not used, but part of the graphdef: one compiled program for all layers
        )
        exact, *others = (
            _gradient(*nnx.split(layer), x, cotangent, method) for method in (EXACT, *methods)
        )
        out.append(
            [float(jnp.linalg.norm(other - exact) / jnp.linalg.norm(exact)) for other in others]
        )
    return out


def choose_methods(
    model: Layered,
    tokens: jax.Array,
    labels: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    ladder: Sequence[Any],
    tolerance: float,
) -> tuple[Any, ...]:
    """For each layer the first method of the ladder whose `gradient_errors` are within the
    tolerance, else Exact.

    Order the ladder from cheap to dear; NaN is never within a tolerance. Costs and cached as
    `gradient_errors`; a model trained with the tuple compiles once for each tuple that it has not
    had.
    Raises ValueError for a tolerance that is not above 0.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: got {tolerance!r}, expected a number above 0")
    return tuple(
        next(
            (method for method, error in zip(ladder, errors, strict=True) if error <= tolerance),
            EXACT,
        )
        for errors in gradient_errors(model, tokens, labels, loss, methods=ladder)
    )
