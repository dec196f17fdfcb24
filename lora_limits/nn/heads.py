"""Attention of one key head by a method: each kind of method is registered here with its own way.

Gradients and factors know nothing of models; what attention makes of them is looked up by type.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_limits.checks import fail
from lora_limits.coordinates import collectives
from lora_limits.factors.block_tree import BlockTree
from lora_limits.factors.method import FactorMethod
from lora_limits.gradients.methods import Exact, Polynomial
from lora_limits.heads import polynomial_blocks, polynomial_full
from lora_limits.heads.visibility import Pattern, Tokens, runs
from lora_limits.nn import clustered, exact, factored
from lora_limits.nn.reverse import reverse_only
from lora_limits.polynomial import monomials

LOG_ENTRIES = 20  # log2 of the entries of a block's largest array, on a CPU
LOG_BLOCKS = (7, 9)  # log2 of the fewest and the most tokens to a block, on a CPU
ENTRIES = 2**25  # of a block's largest array on an accelerator, which must be filled
MOST_CAUSAL = 2048  # tokens there to a block whose own scores are computed exactly
FEW = 128  # keys before which a polynomial of odd degree is not relied upon


@functools.singledispatch
def attend(method: Any, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    """Outputs (n, Hv) of queries q (n, H) that read keys k (S, H) and values v (S, Hv).

    Queries that see no key may get anything but an error.
    Raises ValueError for methods that have no attention (Chain), and for what a method cannot do.
    """
    expected = "Exact, Polynomial or a factor (Skeleton, SparseLowRank, ...)"
    fail("method", repr(method), expected)


def head(method: Any, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    """`attend`, but that a window is a band of f, which every method computes exactly.

    Raises ValueError too for what cannot be where tokens are split over devices.
    """
    if pattern.axis is not None:
        _check_split(method, pattern, tokens, k.shape[0], q.shape[0] // pattern.group)
    if pattern.window is None or attend.dispatch(type(method)) is attend.dispatch(object):
        return attend(method, pattern, tokens, q, k, v)
    return exact.band(pattern, tokens, q, k, v)


def _check_split(method: Any, pattern: Pattern, tokens: Tokens, keys: int, queries: int) -> None:
    where = "with tokens split over devices"
    if not isinstance(method, Exact | Polynomial):
        expected = "Polynomial, or Exact, to which all keys are sent"
        fail(f"method {where}", repr(method), expected)
    if pattern.window is not None:
        fail(f"local_window_size {where}", pattern.window, "None")
    if tokens.query_document is not None:
        fail(f"query_segment_ids {where}", "documents", "none: batch or heads split alone")
    if pattern.is_causal and keys != queries:
        fail(f"key {where} and is_causal", f"{keys} tokens", f"{queries}, as there are queries")
    if isinstance(method, Exact) or not pattern.is_causal:
        return
    if method.degree % 2 == 1 and keys < FEW:
        fail(f"degree {where}", method.degree, f"an even one, or {FEW} tokens a device")


@attend.register
def _(method: Exact, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    return exact.attend(method.block_size or q.shape[0], pattern, tokens, q, k, v)


@attend.register
def _(method: FactorMethod | BlockTree, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    if pattern.is_causal:
        expected = "Exact or Polynomial: a factor looks ahead"
        fail("method of causal attention", repr(method), expected)
    if tokens.query_document is not None:
        fail("method of packed documents", repr(method), "Exact or Polynomial")
    q, k, v = reverse_only(repr(method), (q, k, v))
    asked = jnp.repeat(tokens.query, pattern.group)
    whole: Any = clustered.head if isinstance(method, BlockTree) else factored.head
    return whole(method, q, k, v, asked, tokens.key)


@attend.register
def _(method: Polynomial, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    by_block = pattern.is_causal or pattern.packed
    if by_block and method.series != "taylor":
        expected = "'taylor', which is made of no other tokens"
        what = "causal Polynomial" if pattern.is_causal else "Polynomial on packed documents"
        fail(f"series of a {what}", repr(method.series), expected)
    if tokens.query_document is not None and not pattern.packed:
        expected = "Exact, or the same segment ids for queries and keys"
        fail("method of packed documents", repr(method), expected)
    block = method.block_size or block_size(q, v, method.degree, pattern)
    # block_size counts queries, which a group has several of to a token.
    keys = -(-block // pattern.group) if by_block else block
    # Keys that fit in one block are cheaper exactly.
    if k.shape[0] * collectives.devices(pattern.axis) <= keys:
        return exact.attend(block, pattern, tokens, q, k, v)
    q, k, v = reverse_only(repr(method), (q, k, v))
    if not by_block:
        return polynomial_full.head(method, block, pattern, tokens, q, k, v)
    out = polynomial_blocks.head(method.degree, keys, pattern, tokens, q, k, v)
    if method.degree % 2 == 0 or (keys >= FEW and tokens.query_document is None):
        return out
    return _first_exactly(block, out, pattern, tokens, q, k, v)


def _first_exactly(block: int, out, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    """out, with the first FEW rows of every document computed exactly, if it is causal; else those of
    documents of no more.

    A polynomial of odd degree is negative somewhere, and so may its sum over few keys be.
    """
    group = pattern.group
    if tokens.query_document is None:
        few = min(FEW, k.shape[0])
        tokens = Tokens(tokens.query[:few], tokens.key[:few])
        alone = pattern._replace(axis=None)
        first = exact.attend(block, alone, tokens, q[: few * group], k[:few], v[:few])
        if pattern.axis is not None:
            # the sequence begins on the first device alone
            begins = jax.lax.axis_index(pattern.axis) == 0
            first = jnp.where(begins, first, out[: few * group])
        return jnp.concatenate([first, out[few * group :]])
    near = exact.band(pattern._replace(window=(FEW - 1, FEW - 1)), tokens, q, k, v)
    first, last = runs(tokens.query_document)
    if pattern.is_causal:
        last = jnp.arange(k.shape[0], dtype=jnp.int32)
    return jnp.where(jnp.repeat(last - first < FEW, group)[:, None], near, out)


def block_size(q: jax.Array, v: jax.Array, degree: int, pattern: Pattern) -> int:
    """Queries to a block.

    On a CPU a power of two whose largest array has about 2^20 entries, to stay in cache; on an
    accelerator the largest equal parts of the input of at most 2^25 entries.
    """
    width, value_width = q.shape[1], v.shape[1]
    entries = max(monomials.count(width, degree), width * (1 + value_width))
    if jax.default_backend() == "cpu":
        fitting = (2**LOG_ENTRIES // entries).bit_length() - 1
        fewest, most = LOG_BLOCKS
        return 2 ** min(max(fitting, fewest), most)
    fitting = max(ENTRIES // entries, 2 ** LOG_BLOCKS[0])
    if pattern.is_causal or pattern.packed:
        fitting = min(fitting, MOST_CAUSAL)
    return -(-q.shape[0] // -(-q.shape[0] // fitting))
