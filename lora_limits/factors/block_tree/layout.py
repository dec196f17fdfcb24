"""Where the tokens of a block tree lie: queries in blocks, keys in leaves, and which leaves are near.

In the frame's coordinates f_ij is in proportion to exp(x_i . y_j + log w_j). Both sides are put in
the order of a tree, so that a block, a leaf, a node and a group are all reshapes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.coordinates.frame import NOWHERE
from lora_limits.factors.block_tree.trees import halving
from lora_limits.factors.factor import take
from lora_limits.linalg import dot

BLOCKS = 128  # of like queries, a power of two
SHARING = 16  # queries that share one draw of keys, between 12 and 23
LEAF = 8  # keys of a leaf, between 5 and 12
NODES = 512  # nodes that all leaves fall into, a power of two
ASKED = 4  # one query in as many of a run is asked which leaves matter
GROUPS = 16  # groups that all nodes fall into, a power of two


class Leaves(NamedTuple):
    """Of the keys of each leaf, under their weights."""

    mean: Float[Array, "leaves d"]
    variance: Float[Array, "leaves d"]  # coordinate by coordinate
    log_n: Float[Array, " leaves"]  # log of the sum of the weights


class Layout(NamedTuple):
    """Tokens in tree order. Places that hold no token have index Lq or Lk and weight 0."""

    query: Int[Array, "a u q"]  # queries of each block, in runs that share draws
    live: Float[Array, "a u q"]  # 1 for a query, 0 for padding
    x: Float[Array, "a u q d"]
    centre: Float[Array, "a d"]  # nu_a, the mean of each block's queries
    key: Int[Array, "leaves size"]  # keys of each leaf
    y: Float[Array, "leaves size d"]
    log_w: Float[Array, "leaves size"]
    shift: Float[Array, " a"]  # max_j of nu_a . y_j + log w_j
    leaves: Leaves
    near: Int[Array, "a near"]  # leaves whose keys each block takes exactly, those of largest share
    far: Bool[Array, "a leaves"]  # the others

    @property
    def nodes(self) -> int:
        """Nodes that all leaves fall into: runs of as many leaves each."""
        return min(NODES, self.key.shape[0])

    @property
    def groups(self) -> int:
        """Groups that all nodes fall into, as many in each."""
        return min(GROUPS, self.key.shape[0])


def arrange(x: Float[Array, "lq d_and_1"], y: Float[Array, "lk d_and_1"], near_keys: int) -> Layout:
    """The layout of (x, y) as `Frame.product` makes them, near_keys exact ones to a block.

    O(L d log L) time and log L sorts, beside 4 d Lq Lk / (LEAF ASKED) operations of the shares:
    these, and as many again for the draws of samples.py, are all that grows with L^2.
    """
    lq = x.shape[0]
    lk = y.shape[0]
    x = x[:, :-1]
    log_w = y[:, -1]
    y = y[:, :-1]
    runs = _leaves(x, SHARING)
    blocks = min(BLOCKS, runs.shape[0])
    query = runs.reshape(blocks, -1, runs.shape[1])
    key = _leaves(y, LEAF)
    live = (query < lq).astype(x.dtype)
    x = take(x, query)
    centre = x.sum((1, 2)) / jnp.maximum(live.sum((1, 2)), 1)[:, None]
    shift = (dot(centre, y.T) + log_w[None]).max(1)
    y = take(y, key)
    log_w = jnp.where(key < lk, take(log_w, key), NOWHERE)
    leaves = leaf_statistics(y, log_w)
    share = _shares(x, live, leaves)
    near = jax.lax.top_k(share, min(max(near_keys // key.shape[1], 1), key.shape[0]))[1]
    own = jnp.arange(near.shape[0], dtype=jnp.int32)[:, None]
    far = jnp.ones(share.shape, bool).at[own, near].set(False)
    return Layout(query, live, x, centre, key, y, log_w, shift, leaves, near, far)


def _leaves(points: Float[Array, "n d"], size: int) -> Int[Array, "leaves about_size"]:
    """A tree of 2^l leaves of about that size."""
    n = points.shape[0]
    levels = max(round(math.log2(n / size)), 0)
    return halving(points, levels, -(-n // 2**levels))


def leaf_statistics(y: Float[Array, "leaves size d"], log_w: Float[Array, "leaves size"]) -> Leaves:
    """Of the keys of each leaf under their weights."""
    w = jnp.exp(log_w)[:, :, None]
    total = w.sum(1)
    safe = jnp.maximum(total, jnp.finfo(y.dtype).tiny)
    mean = (w * y).sum(1) / safe
    variance = (w * (y - mean[:, None]) ** 2).sum(1) / safe
    return Leaves(mean, variance, jnp.where(total > 0, jnp.log(safe), NOWHERE)[:, 0])


def shares(
    x: Float[Array, "runs q d"], live: Float[Array, "runs q"], leaves: Leaves
) -> Float[Array, "runs leaves"]:
    """f summed over each leaf, its keys taken for a Gaussian, mean over each run of queries.

    log sum_j w_j e^(x . y_j) ~ log n + x . mean + sum_c x_c^2 variance_c / 2. One query in ASKED is
    looked at: shares say where to look, and nothing that is right depends on them.
    """
    x, live = x[:, ::ASKED], live[:, ::ASKED]
    runs = x.shape[0]
    x, live = x.reshape(-1, x.shape[2]), live.reshape(-1)
    moments = jnp.concatenate([leaves.mean, leaves.variance / 2, leaves.log_n[:, None]], 1)
    s = dot(jnp.concatenate([x, x**2, jnp.ones_like(x[:, :1])], 1), moments.T)
    e = jnp.exp(s - s.max(1, keepdims=True))
    weight = live / e.sum(1)
    member = jnp.repeat(jnp.eye(runs, dtype=x.dtype), x.shape[0] // runs, axis=1)
    member = member * weight[None] / jnp.maximum(dot(member, live[:, None]), 1)
    return dot(member, e)


def _shares(x, live, leaves: Leaves) -> Float[Array, "a leaves"]:
    """`shares` of whole blocks."""

    def block(one):
        x, live = one
        return shares(x, live, leaves).mean(0)

    return jax.lax.map(block, (x, live))
