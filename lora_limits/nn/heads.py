"""Attention of one key head by a method: each kind of method is registered here with its own way.

Gradients and factors know nothing of models; what attention makes of them is looked up by type.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.checks import fail
from lora_limits.factors.block_tree import BlockTree
from lora_limits.factors.method import FactorMethod
from lora_limits.gradients.methods import Exact, Polynomial
from lora_limits.linalg import dot
from lora_limits.nn import clustered, factored, polynomial_causal, polynomial_full
from lora_limits.polynomial import monomials

LOG_ENTRIES = 20  # log2 of the entries of a block's largest array
LOG_BLOCKS = (7, 9)  # log2 of the fewest and the most tokens to a block


@functools.singledispatch
def attend(method: Any, group: int, q, k, v, exists) -> jax.Array:
    """Outputs (n, Hv) of queries q (n, H) that read keys k (S, H) and values v (S, Hv).

    exists: (S,) booleans, which keys there are. group: queries to a token where attention is
    causal, side by side in q; 0 where it is not.
    Raises ValueError for methods that have no attention (Chain), and for what a method cannot do.
    """
    expected = "Exact, Polynomial or a factor (Skeleton, SparseLowRank, ...)"
    fail("method", repr(method), expected)


@attend.register
def _(method: Exact, group: int, q, k, v, exists) -> jax.Array:
    return exact(method.block_size or q.shape[0], group, q, k, v, exists)


@attend.register
def _(method: FactorMethod, group: int, q, k, v, exists) -> jax.Array:
    if group:
        expected = "Exact or Polynomial: a factor looks ahead"
        fail("method of causal attention", repr(method), expected)
    return cast(jax.Array, factored.head(method, q, k, v, exists))


@attend.register
def _(method: BlockTree, group: int, q, k, v, exists) -> jax.Array:
    if group:
        expected = "Exact or Polynomial: clusters look ahead"
        fail("method of causal attention", repr(method), expected)
    return cast(jax.Array, clustered.head(method, q, k, v, exists))


@attend.register
def _(method: Polynomial, group: int, q, k, v, exists) -> jax.Array:
    if group and method.series != "taylor":
        expected = "'taylor', which does not look ahead"
        fail("series of a causal Polynomial", repr(method.series), expected)
    # block_size counts queries, which a causal group has several of to a token.
    block = method.block_size or _block_size(q.shape[1], v.shape[1], method.degree)
    keys = -(-block // group) if group else block
    # Keys that fit in one block are cheaper exactly.
    if k.shape[0] <= keys:
        return exact(block, group, q, k, v, exists)
    if not group:
        return polynomial_full.head(method, block, q, k, v, exists)
    # Features lie tokens last, models tokens first.
    out: Any = polynomial_causal.attend(keys, method.degree, q.T, k.T, exists.astype(q.dtype), v.T)
    return out.T


def _block_size(width: int, value_width: int, degree: int) -> int:
    """Tokens to a block: a power of two whose largest array has about 2^20 entries."""
    entries = max(monomials.count(width, degree), width * (1 + value_width))
    fitting = (2**LOG_ENTRIES // entries).bit_length() - 1
    fewest, most = LOG_BLOCKS
    return 2 ** min(max(fitting, fewest), most)


def exact(
    block: int,
    group: int,
    q: Float[Array, "n h"],
    k: Float[Array, "s h"],
    v: Float[Array, "s hv"],
    exists: Bool[Array, " s"],
) -> Float[Array, "n hv"]:
    """Softmax attention, `block` queries at a time, each block recomputed on the way back.

    group as in `attend`. O(n S (H + Hv)) time, O(block S) memory, derivative included.
    """
    n = q.shape[0]
    size = min(block, n)
    blocks = -(-n // size)

    def rows(tile):
        q, i = tile
        allowed = exists[None]
        if group:
            allowed = allowed & (i[:, None] // group >= jnp.arange(k.shape[0])[None])
        s = jnp.where(allowed, dot(q, k.T), -jnp.inf)
        # Finite for a query that sees no key: -inf less -inf would be NaN.
        least = float(jnp.finfo(s.dtype).min)
        # The largest score cancels in the output, so its derivative is not wanted.
        top = jax.lax.stop_gradient(jnp.max(s, axis=1, keepdims=True, initial=least))
        e = jnp.exp(s - top)
        total = e.sum(1, keepdims=True)
        return dot(e, v) / jnp.where(total > 0, total, 1)

    if blocks == 1:
        return rows((q, jnp.arange(n)))
    padded = jnp.pad(q, ((0, blocks * size - n), (0, 0))).reshape(blocks, size, -1)
    index = jnp.arange(blocks * size).reshape(blocks, size)
    out = jax.lax.map(jax.checkpoint(rows, prevent_cse=False), (padded, index))
    return out.reshape(blocks * size, -1)[:n]
