"""Attention for a Flax model: laid out as jax.nn.dot_product_attention, computed by a method of the
library.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.checks import fail
from lora_limits.factors import FactorMethod
from lora_limits.gradients.solve import Exact, Polynomial
from lora_limits.linalg import dot
from lora_limits.nn import factored, polynomial_causal, polynomial_full
from lora_limits.polynomial import monomials


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    method: Exact | Polynomial | FactorMethod,
    scale: Any = None,
    is_causal: bool = False,
    mask: Any = None,
) -> jax.Array:
    """softmax(scale Q K^T) V for every batch and head, exactly, with a polynomial for exp, or with
    a factor of f.

    query: (B, T, N, H); key: (B, S, K, H); value: (B, S, K, Hv), one floating dtype; query head n
    reads key head
    n // (N / K). scale: a scalar, 1/sqrt(H) by default. is_causal: query t sees keys s <= t,
    whatever T and S are. mask: (B, S) booleans, True where a key exists; what stands elsewhere in
    key and value is never read. Returns (B, T, N, Hv) in that dtype, computed in at least float32.
    jit with method and is_causal static; vmap and reverse-mode derivatives in query, key, value
    (and scale).

    Costs are those of one batch entry; the entries, and the heads, are vmapped. Exact(): O(N T S (H
    + Hv)) time, memory O(N T S); Exact(block_size): memory O(N block_size S), derivative included.

    Polynomial(g): f_ij = w_j P(s_ij) / D_i, queries and keys centred head by head (queries that
    share keys share their centre), k = binom(H + g, g). O((N T + K S) g k (1 + Hv)) time and,
    besides inputs and outputs, O(K k H (1 + Hv) + K block_size (k + H Hv)) memory, derivative
    included: that of this forward, its centres and series held constant. Causal: tokens come in
    blocks of block_size / (N / K); a query reads its own block exactly and the blocks before it
    through P, Taylor's and not centred, so that nothing depends on tokens to come (finite ones),
    bit for bit. Sequences whose keys fit in one such block are computed exactly, causal or not:
    block_size below S to prevent it. Worth it while scores are small (o(log S), Theorem 3.1), the
    more so the higher the degree; no error is certified.

    A factor (Skeleton, SparseLowRank, ...): not causal; O(N T rank H Hv) time beside that of the
    factor, O(N (T + S) rank) memory. No error is estimated here: `gradient` does that.

    A normaliser D_i that is not positive (odd or low degree, large scores) makes the output of that
    query NaN, and NaN every gradient that it enters; raise the degree, make it even, or use Exact.
    A query that sees no key gives 0. Raises ValueError for shapes or dtypes that do not fit
    together, for Chain, and for causal factors and series other than "taylor": they are fitted to
    all scores, the future's included.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    exists = jnp.ones(key.shape[:2], bool) if mask is None else jnp.asarray(mask)
    _check_method(method, is_causal)
    _check_arrays(query, key, value, exists, scale)
    (b, t, n, h), heads = query.shape, key.shape[2]
    dtype = query.dtype if jnp.finfo(query.dtype).bits >= 32 else jnp.float32
    q = query.astype(dtype) * jnp.asarray(1 / np.sqrt(h) if scale is None else scale, dtype)
    if is_causal:
        key, value, exists = (_as_long_as(x, t) for x in (key, value, exists))
    k, v = (jnp.where(exists[:, :, None, None], x, 0).astype(dtype) for x in (key, value))
    one = functools.partial(_head, method, is_causal)
    over_heads = jax.vmap(one, in_axes=(1, 1, 1, None), out_axes=1)
    out = jax.vmap(over_heads)(q.reshape(b, t, heads, n // heads, h), k, v, exists)
    return out.reshape(b, t, n, v.shape[-1]).astype(query.dtype)


def _as_long_as(x: jax.Array, length: int) -> jax.Array:
    """Tokens behind `length` cut off (no query sees them), missing ones added as zeros: (B, S, ...)
    -> (B, T, ...).
    """
    x = x[:, :length]
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _head(method: Exact | Polynomial | FactorMethod, is_causal: bool, q, k, v, exists) -> jax.Array:
    """One key head and the queries (T, G, H) that read it -> (T, G, Hv)."""
    t, group, h = q.shape
    rows = q.reshape(t * group, h)
    if isinstance(method, Exact):
        out = _exact(method.block_size or t * group, is_causal * group, rows, k, v, exists)
    elif isinstance(method, FactorMethod):
        out = cast(jax.Array, factored.head(method, rows, k, v, exists))
    else:
        out = _polynomial(method, is_causal * group, rows, k, v, exists)
    seen = jnp.repeat(jnp.cumsum(exists) > 0, group) if is_causal else exists.any()[None]
    return jnp.where(seen[:, None], out, 0).reshape(t, group, -1)


def _polynomial(method: Polynomial, group: int, q, k, v, exists) -> jax.Array:
    """Outputs (n, Hv) of queries (n, H). group: queries to a token where attention is causal, 0
    where it is not.
    """
    block = method.block_size or _block_size(q.shape[1], v.shape[1], method.degree)
    keys = -(-block // group) if group else block
    if k.shape[0] <= keys:
        return _exact(block, group, q, k, v, exists)
    if not group:
        return polynomial_full.head(method, block, q, k, v, exists)
    out: Any = polynomial_causal.attend(keys, method.degree, q.T, k.T, exists.astype(q.dtype), v.T)
    return out.T


def _block_size(width: int, value_width: int, degree: int) -> int:
    """Tokens to a block: a power of two from 128 to 512 that keeps its largest array near 2^20
    entries.
    """
    entries = max(monomials.count(width, degree), width * (1 + value_width))
    return 2 ** min(max((2**20 // entries).bit_length() - 1, 7), 9)


def _exact(block: int, group: int, q, k, v, exists) -> jax.Array:
    """Softmax attention of queries (n, H), `block` of them at a time, each recomputed on the way
    back.

    group: queries to a token where attention is causal, 0 where it is not.
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
        top = jax.lax.stop_gradient(
            jnp.max(s, axis=1, keepdims=True, initial=float(jnp.finfo(s.dtype).min))
        )
        e = jnp.exp(s - top)
        total = e.sum(1, keepdims=True)
        return dot(e, v) / jnp.where(total > 0, total, 1)

    if blocks == 1:
        return rows((q, jnp.arange(n)))
    padded = jnp.pad(q, ((0, blocks * size - n), (0, 0))).reshape(blocks, size, -1)
    index = jnp.arange(blocks * size).reshape(blocks, size)
    return jax.lax.map(jax.checkpoint(rows, prevent_cse=False), (padded, index)).reshape(
        blocks * size, -1
    )[:n]


def _check_method(method: Any, is_causal: bool) -> None:
    if not isinstance(method, Exact | Polynomial | FactorMethod):
        fail("method", repr(method), "Exact, Polynomial or a factor (Skeleton, SparseLowRank, ...)")
    if is_causal and isinstance(method, FactorMethod):
        fail(
            "method of causal attention", repr(method), "Exact or Polynomial: a factor looks ahead"
        )
    if is_causal and isinstance(method, Polynomial) and method.series != "taylor":
        fail(
            "series of a causal Polynomial",
            repr(method.series),
            "'taylor', which does not look ahead",
        )


def _check_arrays(
    query: jax.Array, key: jax.Array, value: jax.Array, exists: jax.Array, scale: Any
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or 0 in x.shape:
            fail(name, f"shape {x.shape}", "(batch, tokens, heads, width), none of them 0")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            fail(name, f"dtype {x.dtype}", "a floating dtype")
        if x.dtype != query.dtype:
            fail(name, f"dtype {x.dtype}", f"{query.dtype}, the dtype of query")
    (b, _, n, h), (s, heads) = query.shape, key.shape[1:3]
    if key.shape != (b, s, heads, h):
        fail("key", f"shape {key.shape}", f"({b}, tokens, heads, {h}) to fit query {query.shape}")
    if value.shape[:3] != (b, s, heads):
        fail("value", f"shape {value.shape}", f"({b}, {s}, {heads}, width) to fit key {key.shape}")
    if n % heads:
        fail("query", f"{n} heads", f"a multiple of {heads}, the heads of key")
    if exists.shape != (b, s) or exists.dtype != bool:
        fail("mask", f"{exists.dtype} of shape {exists.shape}", f"booleans of shape {(b, s)}")
    if scale is not None and np.ndim(scale) != 0:
        fail("scale", f"shape {np.shape(scale)}", "a scalar")
