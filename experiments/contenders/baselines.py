"""What one would use instead: exact attention in four layouts, FAVOR+ and Nystrom, each
differentiated by jax.grad.

An attention is a function (q, k, v, beta) -> softmax(beta q k^T) v, or what stands in for it:
(Lq, d), (Lk, d), (Lk, d_value), scalar -> (Lq, d_value). Matrix products are at full precision, as
in the library.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_limits.factors.nystrom import segment_means
from lora_limits.linalg import dot
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem, projections, scalars

Attention = Callable[..., jax.Array]
# Singular values below it are dropped: of 1e-2 .. 1e-7 what served Nystrom best in float32.
CUT = 1e-4


def output(problem: LoRAProblem, attention: Attention) -> jax.Array:
    """f V, or what the attention puts in its place: (Lq, d_value)."""
    return attention(*projections(problem), scalars(problem)[1])


def loss(problem: LoRAProblem, attention: Attention) -> jax.Array:
    """1/2 || f V - Y ||_F^2."""
    return 0.5 * ((output(problem, attention) - problem.target) ** 2).sum()


def gradient(problem: LoRAProblem, attention: Attention) -> dict[str, Any]:
    """{name: Adapter}: jax.grad of the loss in every adapter of the problem."""
    return jax.grad(
        lambda adapters: loss(dataclasses.replace(problem, adapters=adapters), attention)
    )(problem.adapters)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    """jax.nn.dot_product_attention: dense, its softmax in float32 whatever the inputs. d_value must
    be d.
    """
    with jax.default_matmul_precision("highest"):
        heads = (x[:, None, :] for x in (beta * q, k, v))
        return jax.nn.dot_product_attention(*heads, scale=1.0, implementation="xla")[:, 0]


def tokamax_chunked(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    """tokamax's attention in chunks of queries and keys, exact, on any device. d_value must be d.

    Needs the package tokamax, which nothing else here does.
    """
    # By name, for the type checker has no such package.
    tokamax, flags = (importlib.import_module(name) for name in ("tokamax", "absl.flags"))
    if not flags.FLAGS.is_parsed():
        # It would read its flags off the command line of whoever imports it.
        flags.FLAGS.mark_as_parsed()
    with jax.default_matmul_precision("highest"):
        heads = (x[None, :, None, :] for x in (beta * q, k, v))
        out = tokamax.dot_product_attention(*heads, scale=1.0, implementation="xla_chunked")
        return out[0, :, 0]


def row_blocked(block: int) -> Attention:
    """Exact, `block` queries at a time against all keys, recomputed in the backward pass. O(L (d +
    block)) memory.
    """

    def attend(q, k, v, beta):
        # The backward pass makes the block's scores again rather than keep all L^2 of them.
        @jax.checkpoint
        def rows(x):
            return dot(jax.nn.softmax(dot(x, k.T), axis=-1), v)

        length = q.shape[0]
        size = min(block, q.shape[0])
        # Padded queries are rows of zeros whose outputs are cut off again.
        padded = jnp.pad(beta * q, ((0, -length % size), (0, 0)))
        return jax.lax.map(rows, padded.reshape(-1, size, q.shape[1])).reshape(-1, v.shape[1])[
            :length
        ]

    return attend


def favor(frequencies: jax.Array) -> Attention:
    """FAVOR+ (Performer): exp(x . y) = E exp(w . x - |x|^2 / 2) exp(w . y - |y|^2 / 2), one feature
    a frequency.

    The largest exponents are divided out as in the published code; its additive constants are not
    taken over, which only helps. O(L k (d + d_value)) time, O(L k) memory.
    """

    def features(x, axis):
        h = dot(x, frequencies.T) - 0.5 * (x**2).sum(1, keepdims=True)
        return jnp.exp(h - jax.lax.stop_gradient(h.max(axis, keepdims=True)))

    def attend(q, k, v, beta):
        left = features(jnp.sqrt(beta) * q, 1)
        right = features(jnp.sqrt(beta) * k, (0, 1))
        out = dot(left, dot(right.T, jnp.concatenate([jnp.ones_like(v[:, :1]), v], 1)))
        return out[:, 1:] / out[:, :1]

    return attend


def nystrom(landmarks: int) -> Attention:
    """Nystromformer: softmax(q k_l^T) pinv(softmax(q_l k_l^T)) softmax(q_l k^T) v, landmarks the
    means of segments.

    The pseudo-inverse is a truncated one, not the six published steps of an iteration, whose
    gradients are off by 90 % where these scores, nearly alike, leave the middle matrix ill
    conditioned. No more landmarks than tokens are taken. O(L k (d + d_value) + k^3) time, O(L k)
    memory.
    """

    def attend(q, k, v, beta):
        # A segment has one token at least.
        few = min(landmarks, q.shape[0], k.shape[0])
        q = beta * q
        q_few = segment_means(q, few)
        k_few = segment_means(k, few)
        left, middle, right = (
            jax.nn.softmax(dot(x, y.T), axis=-1)
            for x, y in ((q, k_few), (q_few, k_few), (q_few, k))
        )
        return dot(left, dot(jnp.linalg.pinv(middle, rtol=CUT), dot(right, v)))

    return attend


def multilayer_problem(key: jax.Array, *, length: int, width: int, rank: int) -> LoRAProblem:
    """MultiLayer's inputs as a head with a query adapter: q, k ~ N(0, 1)/sqrt(d), v ~ N(0, 1), beta
    = 1.

    The frozen query weight makes up for the adapter, so that the queries are those drawn, to
    rounding.
    """
    keys = jax.random.split(key, 6)
    q, k, v, target = (jax.random.normal(keys[i], (length, width)) for i in range(4))
    a = jax.random.normal(keys[4], (rank, width)) / width**0.5
    b = jax.random.normal(keys[5], (width, rank)) / rank**0.5
    eye = jnp.eye(width, dtype=q.dtype)
    return LoRAProblem(
        q / width**0.5,
        k / width**0.5,
        v,
        target,
        weights=AttentionWeights(eye - dot(b, a), eye, eye),
        adapters={"query": Adapter(a, b)},
        scale=1.0,
        beta=1.0,
    )
