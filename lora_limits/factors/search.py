"""Which keys matter to which queries: trees of like tokens, and a search from leaf to leaf.

Queries in blocks of like ones share a set of t keys. The centres of a few like blocks are scored
against the centres of leaves of like keys, then against the keys of the best leaves; the best of
these are scored against every query of each block, which takes the keys of the largest summed f.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_limits.coordinates.frame import NOWHERE
from lora_limits.coordinates.sweep import scan
from lora_limits.factors.factor import take
from lora_limits.linalg import dot

LEAF = 16  # tokens to a leaf of either tree, at least; at most twice as many
TOGETHER = 4  # blocks of queries that share candidates, a power of two
REACH = 32  # keys of the best leaves, for each entry kept: scored against the blocks' centres
CANDIDATES = 6  # of these, scored against every query
NEGLIGIBLE = 20  # a score this far below the largest of its query


def tree(points: Float[Array, "n d"], leaf: int) -> Int[Array, "leaves size"]:
    """Indices of points in leaves of like points, leaf <= size <= 2 leaf; n is padding.

    Halves at the median along the direction of largest spread, found by a few power iterations.
    O(n d log n).
    """
    n = points.shape[0]
    levels = max(0, int(math.log2(n / leaf))) if n > leaf else 0
    leaves = 2**levels
    size = -(-n // 2**levels)
    numbers = jnp.arange(leaves, dtype=jnp.int32)

    def halve(order, level):
        # A node is a run of `width` leaves. Shapes are the same at every level, so that one program
        # serves all.
        width = leaves >> level
        first = numbers // width * width

        def over_node(x):
            sums = jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(x, axis=0)])
            return sums[first + width] - sums[first]

        z = take(points, order)
        z = z - over_node(z.mean(1))[:, None] / width.astype(z.dtype)
        direction = z[first, 0] + 1e-3
        for _ in range(2):
            along = jnp.einsum("pnd,pd->pn", z, direction)
            direction = over_node(jnp.einsum("pnd,pn->pd", z, along))
            top = jnp.abs(direction).max(1, keepdims=True)
            direction = direction / jnp.where(top > 0, top, 1)
        along = jnp.einsum("pnd,pd->pn", z, direction).reshape(-1)
        node = jnp.repeat(first, size, total_repeat_length=along.shape[0])
        _, _, order_now = jax.lax.sort((node, along, order.reshape(-1)), num_keys=2)
        return order_now.reshape(order.shape), None

    order = jnp.arange(size * leaves, dtype=jnp.int32).reshape(leaves, size)
    order = jnp.where(order < n, order, n)
    if not levels:
        return order
    return scan(halve, order, jnp.arange(levels, dtype=jnp.int32))[0]


class Found(NamedTuple):
    """What the search found."""

    query: Int[Array, "blocks b"]
    key: Int[Array, "blocks t"]
    score: Float[Array, "blocks b t"]  # s there, NOWHERE for a key that does not exist
    cap: Float[Array, "blocks b"]  # tau_i
    order: Int[Array, " leaves_times_size"]  # keys, like ones side by side


def search(x: Float[Array, "lq d_and_1"], y: Float[Array, "lk d_and_1"], entries: int) -> Found:
    """The t = min(entries, Lk) keys that have the largest f in each block of queries.

    As far as leaves tell. O(Lq t d) time beside the trees and (Lq / b)(Lk / size) d of their leaves.
    """
    queries = tree(x[:, :-1], LEAF)
    leaves = tree(y[:, :-1], LEAF)
    size = leaves.shape[1]
    t = min(entries, y.shape[0])
    near = min(-(-REACH * t // size), leaves.shape[0])
    candidates = min(CANDIDATES * t, near * size)
    exists = leaves < y.shape[0]
    centre = take(y[:, :-1], leaves).sum(1) / jnp.maximum(exists.sum(1), 1)[:, None].astype(y.dtype)
    log_w = jax.nn.logsumexp(jnp.where(exists, take(y[:, -1], leaves), NOWHERE), axis=1)
    centre = jnp.concatenate([centre, log_w[:, None]], 1)

    def near_ones(blocks):
        """Keys that some block of a few like ones (g, b) may want."""
        here = take(x, blocks)
        means = here.sum(1) / jnp.maximum(here[:, :, -1:].sum(1), 1)
        best = jax.lax.top_k(dot(centre, means.T).max(1), near)[1]
        keys = leaves[best].reshape(-1)
        rough = jnp.where(keys < y.shape[0], dot(take(y, keys), means.T).max(1), NOWHERE)
        return keys[jax.lax.top_k(rough, candidates)[1]]

    def block(index, keys):
        here = take(x, index)
        s = jnp.where(keys[None] < y.shape[0], dot(here, take(y, keys).T), NOWHERE)
        f = jax.nn.softmax(s, axis=1) * here[:, -1:]
        chosen = jax.lax.top_k(f.sum(0), min(t, s.shape[1]))[1]
        rest = s.at[:, chosen].set(NOWHERE).max(1)
        # where nothing is left out, what the low-rank part does is negligible whatever it is
        return keys[chosen], s[:, chosen], jnp.maximum(rest, s.max(1) - NEGLIGIBLE)

    def group(blocks):
        keys = near_ones(blocks)
        return jax.vmap(lambda index: block(index, keys))(blocks)

    together = min(TOGETHER, queries.shape[0])
    found = jax.lax.map(group, queries.reshape(-1, together, queries.shape[1]), batch_size=4)
    key, score, cap = (z.reshape(queries.shape[0], *z.shape[2:]) for z in found)
    return Found(queries, key, score, cap, leaves.reshape(-1))
