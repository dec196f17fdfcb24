"""A model's attention layers as LoRA problems, one a head: norms, and a method for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_limits.checks import fail
from lora_limits.gradients.methods import Exact
from lora_limits.linalg import AnyArray
from lora_limits.nn.layered import Layered
from lora_limits.nn.lora import LoRAAttention
from lora_limits.norms import NormReport, norm_report
from lora_limits.problem import NAMES, Adapter, AttentionWeights, LoRAProblem

# Tiled, so that a layer is held against exact attention at any length.
EXACT = Exact(512)


def problem_of(
    layer: LoRAAttention,
    x: Float[Array, "l d_model"],
    cotangent: Float[Array, "l heads width"] | None = None,
) -> LoRAProblem:
    """The layer's heads on one sequence, as LoRAProblems stacked along a first axis: vmap over it.

    Y = f V - cotangent, so that the gradient of 1/2 || f V - Y ||^2 is the vector-Jacobian product
    of the heads with the cotangent; without one Y is what the layer's attention puts out, f V where
    it is not causal. Gradients are linear in the cotangent: scale one that is tiny beside f V, or
    float32 loses it. A head's B is the layer's, its A the layer's columns of that head: gradients
    of B add up over heads. Biases are a column of ones in x. softmax_1: a key of zeros in front.
    Time and memory of exact tiled attention.
    Raises ValueError for a layer with query-key normalisation or rotary positions (no W gives its
    scores), without adapters of query, key or value, and for a cotangent of a causal layer, as a
    LoRAProblem has no mask.
    """
    if not layer.projected:
        fail("layer", "query-key normalisation or rotations", "scores that are x W_Q W_K^T x^T")
    if layer.is_causal and cotangent is not None:
        fail("cotangent", "one for a causal layer", "none: a LoRAProblem has no mask")
    weights, adapters, scale = _weights(layer)
    scale = jnp.asarray(scale, x.dtype)
    beta = jnp.asarray(layer.width**-0.5, x.dtype)
    x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1)
    # A key of zeros has score 0 with every query: the 1 of softmax_1.
    keys = jnp.pad(x, ((1, 0), (0, 0))) if layer.softmax_1 else x
    # without the column of ones that x now has
    target = layer.attend(x[None, :, :-1], EXACT)[0]
    target = target if cotangent is None else target - cotangent

    def head(weights, a, target):
        return LoRAProblem(
            x,
            keys,
            keys,
            target,
            weights=AttentionWeights(**weights),
            adapters={name: Adapter(a[name], adapters[name]) for name in a},
            scale=scale,
            beta=beta,
        )

    a = {name: _by_head(getattr(layer, name).a[...], layer) for name in adapters}
    return jax.vmap(head)(weights, a, target.transpose(1, 0, 2))


def _by_head(
    matrix: Float[Array, "n some_heads_width"], layer: LoRAAttention
) -> Float[Array, "heads n width"]:
    """The columns of each query head: its own, or those of the key head that it reads."""
    parts = matrix.reshape(matrix.shape[0], -1, layer.width).transpose(1, 0, 2)
    return jnp.repeat(parts, layer.heads // len(parts), axis=0)


def _weights(layer: LoRAAttention) -> tuple[dict[str, jax.Array], dict[str, jax.Array], float]:
    """({name: W with its bias as last row, by head}, {name: B with a row of zeros}, scale)."""
    weights = {}
    b = {}
    for name in NAMES:
        projection = getattr(layer, name)
        kernel = projection.kernel[...]
        last = jnp.zeros_like(kernel[:1]) if projection.bias is None else projection.bias[...][None]
        weights[name] = _by_head(jnp.concatenate([kernel, last]), layer)
        if projection.b is not None:
            # The bias is not adapted.
            b[name] = jnp.pad(projection.b[...], ((0, 1), (0, 0)))
    if not b:
        fail("layer", f"adapters of {layer.adapt}", "one of query, key or value")
    return weights, b, getattr(layer, next(iter(b))).scale


def _row_problems(layer: LoRAAttention, x: jax.Array) -> LoRAProblem:
    """As problem_of, for norms alone: Q, K and V themselves, whatever made them, under W = I."""

    def head(q, k, v):
        one = jnp.eye(layer.width, dtype=q.dtype)
        zero = jnp.zeros((1, layer.width), q.dtype)
        weights = AttentionWeights(query=one, key=one, value=one)
        adapters = {"value": Adapter(zero, zero.T)}
        scale = jnp.asarray(1.0, q.dtype)
        beta = jnp.asarray(layer.width**-0.5, q.dtype)
        return LoRAProblem(q, k, v, v, weights=weights, adapters=adapters, scale=scale, beta=beta)

    q, k, v = (rows[0] for rows in layer.rows(x[None]))
    # Query heads that share keys are problems of their own.
    k, v = (jnp.repeat(rows, layer.heads // layer.key_heads, axis=1) for rows in (k, v))
    return jax.vmap(head, 1)(q, k, v)


def norms(model: Layered, tokens: Int[Array, "b l"]) -> tuple[NormReport, ...]:
    """Gamma, R and the other norms of every layer: one report for each, its entries (B, heads).

    Of x W_Q and x W_K as they are; after normalisation and rotations where there are such, and then
    the norms of the updates are 0 and those of Theorem A.1 are of the rows. A causal head is
    reported as if every query saw every key. jit applies. O(B L d_model heads width) time, and the
    time of the model's own forward.
    """

    def reports(layer, x):
        make = problem_of if layer.projected else _row_problems
        return jax.vmap(lambda x: jax.vmap(norm_report)(make(layer, x)))(x)

    read = model.trace(tokens)[1]
    return tuple(reports(block.attention, x) for block, x in zip(model.blocks, read, strict=True))


def cotangents(
    model: Layered, tokens: Int[Array, "b l"], loss: Callable[[jax.Array], jax.Array]
) -> tuple[tuple[Float[Array, "b l d_model"], ...], tuple[Float[Array, "b l heads width"], ...]]:
    """(x, dloss/d(head outputs)) of every layer, by the model's methods."""
    # Zeros added to what the heads put out: the loss's gradient in them is the cotangent.
    dtype = model.embedding[...].dtype
    layers = [block.attention for block in model.blocks]
    probes = [jnp.zeros((*tokens.shape, a.heads, a.width), dtype) for a in layers]

    def run(probes):
        logits, read = model.trace(tokens, probes)
        return loss(logits), read

    grads, read = jax.grad(run, has_aux=True)(probes)
    return read, tuple(grads)


def adapter_gradient(
    layer: LoRAAttention,
    x: Float[Array, "b l d_model"],
    cotangent: Float[Array, "b l heads width"],
    method: Any,
) -> Any:
    """The gradient of the layer's adapters by a method, as an nnx state of their arrays.

    x: what the layer reads; cotangent: of its heads' outputs.
    """
    graphdef, adapters, rest = nnx.split(layer, nnx.LoRAParam, ...)
    back = jax.vjp(lambda a: nnx.merge(graphdef, a, rest).attend(x, method), adapters)[1]
    return back(cotangent)[0]


# Both are jitted once for the module, so that later calls find what was compiled.
@functools.partial(jax.jit, static_argnums=(0, 4))
def _gradient(
    graphdef: Any, params: Any, x: jax.Array, cotangent: jax.Array, method: Any
) -> jax.Array:
    gradient = adapter_gradient(nnx.merge(graphdef, params), x, cotangent, method)
    leaves = jax.tree.leaves(gradient)
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


@functools.partial(jax.jit, static_argnums=(0, 4))
def _cotangents(graphdef: Any, params: Any, tokens: jax.Array, labels: jax.Array, loss: Any) -> Any:
    return cotangents(nnx.merge(graphdef, params), tokens, lambda logits: loss(logits, labels))


def gradient_errors(
    model: Layered,
    tokens: Int[AnyArray, "b l"],
    labels: Int[AnyArray, "b ..."],
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
        # Not used, but part of the graphdef: one compiled program then serves all layers.
        layer.method = EXACT
        split = nnx.split(layer)
        exact, *others = (_gradient(*split, x, cotangent, m) for m in (EXACT, *methods))
        size = jnp.linalg.norm(exact)
        out.append([float(jnp.linalg.norm(other - exact) / size) for other in others])
    return out


def choose_methods(
    model: Layered,
    tokens: AnyArray,
    labels: AnyArray,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    ladder: Sequence[Any],
    tolerance: float,
) -> tuple[Any, ...]:
    """For each layer the first method of the ladder that is within the tolerance, else Exact.

    Within it are the layer's `gradient_errors`; NaN never is. Order the ladder from cheap to dear.
    Costs as `gradient_errors` does, and is compiled as often; a model trained with the tuple
    compiles once for each tuple that it has not had.
    Raises ValueError for a tolerance that is not above 0.
    """
    if not tolerance > 0:
        fail("tolerance", repr(tolerance), "a number above 0")
    chosen = []
    for errors in gradient_errors(model, tokens, labels, loss, methods=ladder):
        tried = zip(ladder, errors, strict=True)
        chosen.append(next((method for method, error in tried if error <= tolerance), EXACT))
    return tuple(chosen)
