"""Through all blocks: attention forward, its way back, and both at once for a loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.factors.block_tree import block as blocks
from lora_limits.factors.block_tree import far as far_keys
from lora_limits.factors.block_tree import samples
from lora_limits.factors.block_tree.block import Keys, Scores
from lora_limits.factors.block_tree.far import Returns, Sums
from lora_limits.factors.block_tree.layout import Layout, Leaves, shares
from lora_limits.factors.factor import take
from lora_limits.linalg import row_norms


class Block(NamedTuple):
    """One block of queries and what it knows of the keys; of all blocks, stacked."""

    x: Float[Array, "... b d"]
    live: Float[Array, "... b"]
    centre: Float[Array, "... d"]
    shift: Float[Array, "*blocks"]
    near: Int[Array, "... near"]
    far_leaf: Bool[Array, "... leaves"]
    far: Sums

    @property
    def delta(self) -> Float[Array, "b d"]:
        """Queries off the centre."""
        return self.x - self.centre[None]


class Forward(NamedTuple):
    """Of every query of every block: f V, and D in units of e^top."""

    out: Float[Array, "... b dv"]
    total: Float[Array, "... b"]
    moved: Float[Array, "... b"]  # how far the remainder moved f V; inf where it was not believed


class Back(NamedTuple):
    """p z of every query, and what near keys and far ones get."""

    queries: Float[Array, "... b m"]
    near: Float[Array, "... near dv_and_m"]
    returns: Returns


def stacked(layout: Layout, far: Sums) -> Block:
    """All blocks."""
    a = layout.x.shape[0]
    x = layout.x.reshape(a, -1, layout.x.shape[-1])
    live = layout.live.reshape(a, -1)
    tokens = x, live, layout.centre, layout.shift
    return Block(*tokens, layout.near, layout.far, far)


def key_columns(
    layout: Layout, v: Float[Array, "leaves size dv"], z: Float[Array, "leaves size m"]
) -> Float[Array, "leaves size columns"]:
    """y, log w, 1, v and z of each key side by side, so that one look-up finds all of them."""
    ones = jnp.ones_like(layout.log_w)[:, :, None]
    return jnp.concatenate([layout.y, layout.log_w[:, :, None], ones, v, z], 2)


def near_keys(block: Block, columns: jax.Array) -> Keys:
    """The near keys of a block."""
    found = columns[block.near].reshape(-1, columns.shape[2])
    y, log_w, ones_v_z = jnp.split(found, (block.x.shape[1], block.x.shape[1] + 1), axis=1)
    return Keys(y, log_w[:, 0] - block.shift, ones_v_z)


class Source(NamedTuple):
    """Where remainders are drawn from: the keys, and how large values are in each leaf."""

    leaves: Leaves
    keys: Float[Array, "leaves size columns"]  # y, log w, 1 and v of each key
    size: Float[Array, " leaves"]


def source(layout: Layout, v: Float[Array, "leaves size dv"]) -> Source:
    """Of all keys."""
    keys = key_columns(layout, v, v[:, :, :0])
    return Source(layout.leaves, keys, jnp.sqrt((v**2).sum(2)).mean(1))


def draws(layout: Layout, far: Sums, of: Source, key: jax.Array, count: int) -> samples.Draws:
    """`count` keys for each run of each block.

    Of all blocks before any is gone through: were it done on the way, XLA would find out where a key
    lies once for each of its columns.
    """

    def one(each):
        x, live, far_leaf, far, start = each
        share = shares(x, live, of.leaves)
        places = of.keys.shape[1]
        return samples.draws(share, far_leaf, of.leaves, of.size, far, start, count, places)

    start = jax.random.uniform(key, layout.query.shape[:2], layout.x.dtype)
    return jax.lax.map(one, (layout.x, layout.live, layout.far, far, start))


def forward_block(block: Block, s: Scores, draw: samples.Draws, of: Source) -> Forward:
    """f V of one block, its remainder from the keys that are drawn."""
    total, numerator = blocks.forward(s)
    more, more_numerator = samples.remainder(
        draw, of.keys, s, block.x, block.centre, block.shift, block.far
    )
    before = numerator / total[:, None]
    believed = jnp.isfinite(more) & (total + more > samples.LEAST * total)
    total = jnp.where(believed, total + more, total)
    numerator = numerator + jnp.where(believed[:, None], more_numerator, 0)
    out = numerator / total[:, None]
    return Forward(out, total, jnp.where(believed, row_norms(out - before), jnp.inf))


def back_block(block: Block, keys: Keys, s: Scores, total, c, zq) -> Back:
    """The way back through one block from c = dl/d(f V)."""
    f = blocks.kernel(s, total)
    p = blocks.weights(s, f, c, keys, block.far)
    queries = blocks.times(s, f, p, block.delta, keys, block.far)
    return Back(queries, *blocks.transposed(s, f, p, c, zq, block.far))


def to_keys(
    layout: Layout, v: Float[Array, "leaves size dv"], far: Sums, back: Back
) -> Float[Array, "leaves size dv_and_m"]:
    """What every key gets, from the blocks that it is near and from those that it is far from."""
    out = far_keys.back_to_keys(layout, v, far, back.returns)
    a, t = layout.near.shape
    leaves = out.reshape(out.shape[0], -1)
    # whole leaves are added: their rows are long enough for that to be quick
    near = back.near.reshape(a * t, -1)
    return leaves.at[layout.near.reshape(-1)].add(near).reshape(out.shape)


def of_blocks(layout: Layout, z: Float[Array, "lq n"]) -> Float[Array, "a b n"]:
    """Rows of queries, block by block."""
    return take(z, layout.query.reshape(layout.query.shape[0], -1))


def in_order(
    index: Int[Array, "*blocks"], values: jax.Array, length: int
) -> Float[Array, "length n"]:
    """Values in tree order -> in the order of the tokens."""
    flat = values.reshape(index.size, -1)
    return (
        jnp.zeros((length, flat.shape[1]), flat.dtype)
        .at[index.reshape(-1)]
        .set(flat, mode="drop", unique_indices=True)
    )


def attention(layout: Layout, v: Float[Array, "lk dv"], key: jax.Array, count: int) -> Forward:
    """f V of every query, in blocks."""
    v = take(v, layout.key)
    none = v[:, :, :0]
    far = far_keys.sums(layout, v, none)
    columns = key_columns(layout, v, none)
    of = source(layout, v)

    def one(each):
        block, draw = each
        keys = near_keys(block, columns)
        s = blocks.scores(block.x, block.centre, keys, block.far)
        return forward_block(block, s, draw, of)

    return jax.lax.map(one, (stacked(layout, far), draws(layout, far, of, key, count)))


def attention_back(
    layout: Layout,
    v: Float[Array, "lk dv"],
    total: Float[Array, "a b"],
    c: Float[Array, "lq dv"],
    zq: Float[Array, "lq m"],
    zk: Float[Array, "lk m"],
) -> tuple[Float[Array, "lq m"], Float[Array, "lk m"], Float[Array, "lk dv"]]:
    """(p zk, p^T zq, f^T c)."""
    v = take(v, layout.key)
    in_tree = take(zk, layout.key)
    far = far_keys.sums(layout, v, in_tree)
    columns = key_columns(layout, v, in_tree)

    def one(each):
        block, total, c, zq = each
        keys = near_keys(block, columns)
        s = blocks.scores(block.x, block.centre, keys, block.far)
        return back_block(block, keys, s, total, c, zq)

    of_queries = of_blocks(layout, c), of_blocks(layout, zq)
    back = jax.lax.map(one, (stacked(layout, far), total, *of_queries))
    keys = in_order(layout.key, to_keys(layout, v, far, back), zk.shape[0])
    queries = in_order(layout.query, back.queries, zq.shape[0])
    return queries, keys[:, v.shape[2] :], keys[:, : v.shape[2]]


class Through(NamedTuple):
    """A loss all the way through: f V and p zk of the queries, p^T zq and f^T c of the keys."""

    forward: Forward
    far: Sums
    out: Float[Array, "lq dv"]
    queries: Float[Array, "lq m"]
    keys: Float[Array, "lk m"]
    values: Float[Array, "lk dv"]


def through(
    layout: Layout,
    v: Float[Array, "lk dv"],
    target: Float[Array, "lq dv"],
    zq: Float[Array, "lq m"],
    zk: Float[Array, "lk m"],
    key: jax.Array,
    count: int,
) -> Through:
    """Forward and back at once for c = f V - target: scores are computed once."""
    lq = zq.shape[0]
    lk = zk.shape[0]
    v = take(v, layout.key)
    zk = take(zk, layout.key)
    far = far_keys.sums(layout, v, zk)
    columns = key_columns(layout, v, zk)

    def one(each):
        block, draw, target, zq = each
        keys = near_keys(block, columns)
        s = blocks.scores(block.x, block.centre, keys, block.far)
        done = forward_block(block, s, draw, of)
        c = (done.out - target) * block.live[:, None]
        return done, back_block(block, keys, s, done.total, c, zq)

    of = source(layout, v)
    found = draws(layout, far, of, key, count)
    of_queries = of_blocks(layout, target), of_blocks(layout, zq)
    done, back = jax.lax.map(one, (stacked(layout, far), found, *of_queries))
    keys = in_order(layout.key, to_keys(layout, v, far, back), lk)
    out = in_order(layout.query, done.out, lq)
    queries = in_order(layout.query, back.queries, lq)
    return Through(done, far, out, queries, keys[:, v.shape[2] :], keys[:, : v.shape[2]])
