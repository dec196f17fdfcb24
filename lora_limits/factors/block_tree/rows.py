"""Rows of f and of p written out, exact and as the tree has them: to repair the worst, and to judge.

The loss is a sum over queries, so an error of the gradient is a sum over them too. Where a row is
known both ways its part of the error is known, and can be taken out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_limits.estimate.rows import of_adapter
from lora_limits.factors.block_tree import block as blocks
from lora_limits.factors.block_tree import passes
from lora_limits.factors.block_tree.layout import Layout
from lora_limits.factors.factor import take
from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, scalars

TOGETHER = 16  # rows written out at a time


class Rows(NamedTuple):
    """Of some queries; keys in the order of their tree, flat. What is less is exact less tree."""

    for_queries: Float[Array, "n keys"]  # p less that of p z
    for_keys: Float[Array, "n keys"]  # p less that of p^T z
    f: Float[Array, "n keys"]
    less_f: Float[Array, "n keys"]
    c: Float[Array, "n dv"]
    less_c: Float[Array, "n dv"]


def written_out(
    layout: Layout, found: passes.Through, v: jax.Array, target: jax.Array, index: Int[Array, " n"]
) -> Rows:
    """Rows `index` both ways. O(n Lk (d + d_value)) time, O(m Lk) memory."""
    v = take(v, layout.key)
    columns = passes.key_columns(layout, v, v[:, :, :0])
    place = _places(layout, target.shape[0])[index]
    # p z itself is not wanted
    far = found.far._replace(z=found.far.z[:, :, :0])
    stacked = passes.stacked(layout, far)
    total = found.forward.total.reshape(-1)[place]
    c = found.out[index] - target[index]
    per_block = stacked.x.shape[1]

    def one(each):
        place, total, c, target = each
        a = place // per_block
        block = jax.tree.map(lambda z: z[a], stacked)
        block = block._replace(x=block.x[place % per_block][None])
        return _row(layout, block, columns, v, total[None], c[None], target[None])

    out = jax.lax.map(one, (place, total, c, target[index]), batch_size=TOGETHER)
    return jax.tree.map(lambda z: z[:, 0], out)


def _places(layout: Layout, lq: int) -> Int[Array, " lq"]:
    """Where each query lies among the places of all blocks."""
    query = layout.query.reshape(-1)
    numbers = jnp.arange(query.shape[0], dtype=jnp.int32)
    return jnp.zeros(lq, jnp.int32).at[query].set(numbers, mode="drop")


def _row(layout: Layout, block: passes.Block, columns, v, total, c, target) -> Rows:
    """A block of one query."""
    leaves, size = layout.key.shape
    # exact
    flat_v = v.reshape(leaves * size, -1)
    s = dot(block.x, layout.y.reshape(leaves * size, -1).T) + layout.log_w.reshape(1, -1)
    f = jax.nn.softmax(s, axis=1)
    out = dot(f, flat_v)
    true_c = out - target
    p = f * (dot(true_c, flat_v.T) - (true_c * out).sum(1, keepdims=True))
    # as the tree has them: W_aj times the entry of the node, and what is linear in the key
    keys = passes.near_keys(block, columns)
    scores = blocks.scores(block.x, block.centre, keys, block.far)
    kernel = blocks.kernel(scores, total)
    weights = blocks.weights(scores, kernel, c, keys, block.far)
    at_centre = dot(layout.y, block.centre) + layout.log_w - block.shift
    w = jnp.where(block.far_leaf[:, None], jnp.exp(at_centre), 0).reshape(1, -1)
    nodes = block.far.n.shape[0]
    node_of = jnp.arange(leaves * size, dtype=jnp.int32) // (leaves * size // nodes)
    group_of = node_of // (nodes // scores.gamma.shape[1])
    n = jnp.maximum(block.far.n, jnp.finfo(w.dtype).tiny)
    y = layout.y.reshape(leaves * size, -1)
    along_v = dot(weights.h, flat_v.T) - dot(weights.h, block.far.v.T)[:, node_of]
    along_y = dot(block.delta, y.T) - dot(block.delta, block.far.y.T)[:, node_of]

    def in_full(near, node, rest):
        each = w * ((node / n[None])[:, node_of] + rest)
        near = near.reshape(-1, size)
        return each.reshape(leaves, size).at[block.near].set(near).reshape(1, -1)

    tree_f = in_full(scores.near * kernel.near, scores.node * kernel.node, 0)
    linear = scores.gamma[:, group_of] * along_v
    tree_p = in_full(weights.near, weights.node, linear)
    # p z has one more term, and less of f
    more = w * weights.epsilon[:, group_of] * along_y - weights.less * tree_f
    return Rows(p - (tree_p + more), p - tree_p, f, f - tree_f, true_c, true_c - c)


def terms(
    problem: LoRAProblem,
    layout: Layout,
    rows: Rows,
    index: Int[Array, " n"],
    q: Float[Array, "lq d"],
    k: Float[Array, "lk d"],
) -> dict[str, Adapter]:
    """The share of rows `index` in the error of each array, as terms. O(n Lk (d + d_model)) time."""
    beta = scalars(problem)[1]
    lk = k.shape[0]
    numbers = jnp.arange(layout.key.size, dtype=jnp.int32)
    place = jnp.zeros(lk, jnp.int32).at[layout.key.reshape(-1)].set(numbers, mode="drop")
    # in the order of the tokens
    rows = rows._replace(**{name: getattr(rows, name)[:, place] for name in Rows._fields[:4]})
    outer = {
        "query": lambda: (problem.x_query[index][None], beta * dot(rows.for_queries, k)[None]),
        "key": lambda: (dot(rows.for_keys, problem.x_key)[None], beta * q[index][None]),
        "value": lambda: (
            dot(jnp.stack([rows.less_f, rows.f - rows.less_f]), problem.x_value),
            jnp.stack([rows.c, rows.less_c]),
        ),
    }
    return {name: of_adapter(problem, name, *outer[name]()) for name in problem.adapters}


def repaired(
    layout: Layout,
    found: passes.Through,
    rows: Rows,
    index: Int[Array, " n"],
    zq: Float[Array, "lq m"],
    zk: Float[Array, "lk m"],
) -> passes.Through:
    """The same with rows `index` exact."""
    lk = zk.shape[0]
    in_tree = take(zk, layout.key).reshape(layout.key.size, -1)
    of_keys = dot(zq[index].T, rows.for_keys)
    # f^T c less that of the tree
    tree_f = rows.f - rows.less_f
    of_values = dot(rows.c.T, rows.less_f) + dot(rows.less_c.T, tree_f)
    both = passes.in_order(layout.key, jnp.concatenate([of_keys, of_values]).T, lk)
    m = zk.shape[1]
    return found._replace(
        out=found.out.at[index].add(rows.less_c),
        queries=found.queries.at[index].add(dot(rows.for_queries, in_tree)),
        keys=found.keys + both[:, :m],
        values=found.values + both[:, m:],
    )
