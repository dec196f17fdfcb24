"""Attention in which every query sees every key, and its derivative, by clusters of keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates import frame as frames
from lora_limits.factors.block_tree import passes
from lora_limits.factors.block_tree.layout import arrange
from lora_limits.factors.block_tree.method import BlockTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head(
    method: BlockTree,
    q: Float[Array, "n d"],
    k: Float[Array, "s d"],
    v: Float[Array, "s dv"],
    asked: Bool[Array, " n"],
    exists: Bool[Array, " s"],
) -> Float[Array, "n dv"]:
    """f~ V for scores q k^T, and its derivative; as BlockTree in time and memory, no rows repaired.

    asked, exists: which queries and which keys there are; 0 for queries that are not there.
    """
    return _forward(method, q, k, v, asked, exists)[0]


def _forward(method, q, k, v, asked, exists):
    frame = frames.of_rows(q, k, v, asked, exists)
    xy = frame.product(q - frame.nu[None], k - frame.mu[None], exists, asked)
    layout = arrange(*xy, method.near)
    v = v - frame.v_mean[None]
    key = method.key(jnp.where(asked[:, None], q, 0))
    found = passes.attention(layout, v, key, method.samples)
    out = passes.in_order(layout.query, found.out, q.shape[0]) + frame.v_mean[None]
    out = jnp.where(asked[:, None], out, 0)
    return out, (layout, found.total, q, k, v, asked)


def _backward(method, kept, g):
    del method
    layout, total, q, k, v, asked = kept
    g = jnp.where(asked[:, None], g, 0)
    # p 1 = 0: centred keys give the same, with less cancellation.
    k = k - k.mean(0, keepdims=True)
    return *passes.attention_back(layout, v, total, g, q, k), None, None


head.defvjp(_forward, _backward)
