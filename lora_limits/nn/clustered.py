"""Attention in which every query sees every key, and its derivative, by clusters of keys."""

from __future__ import annotations

import functools

import jax
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
    exists: Bool[Array, " s"],
) -> Float[Array, "n dv"]:
    """f~ V for scores q k^T, and its derivative; as BlockTree in time and memory, no rows repaired."""
    return _forward(method, q, k, v, exists)[0]


def _forward(method, q, k, v, exists):
    frame = frames.of_rows(q, k, v, exists)
    xy = frame.product(q - frame.nu[None], k - frame.mu[None], exists)
    layout = arrange(*xy, method.near)
    v = v - frame.v_mean[None]
    found = passes.attention(layout, v, method.key(q), method.samples)
    out = passes.in_order(layout.query, found.out, q.shape[0]) + frame.v_mean[None]
    return out, (layout, found.total, q, k, v)


def _backward(method, kept, g):
    del method
    layout, total, q, k, v = kept
    # p 1 = 0: centred keys give the same, with less cancellation.
    k = k - k.mean(0, keepdims=True)
    return *passes.attention_back(layout, v, total, g, q, k), None


head.defvjp(_forward, _backward)
