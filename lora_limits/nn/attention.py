"""Attention for a Flax model: jax.nn.dot_product_attention's layout, by a method of the library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from lora_limits.checks import fail
from lora_limits.method import Method
from lora_limits.nn.heads import attend


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    method: Method,
    scale: Any = None,
    is_causal: bool = False,
    mask: Any = None,
) -> jax.Array:
    """softmax(scale Q K^T) V for every batch and head, by any method of the library but Chain.

    query: (B, T, N, H); key: (B, S, K, H); value: (B, S, K, Hv), one floating dtype. Query head n
    reads key head n // (N / K). scale: a scalar, 1/sqrt(H) by default. is_causal: query t sees
    keys s <= t, whatever T and S are. mask: (B, S) booleans, True where a key exists; what stands
    elsewhere in key and value is never read.
    Returns (B, T, N, Hv) in that dtype, computed in at least float32. jit with method and
    is_causal static; vmap and reverse-mode derivatives in query, key, value (and scale).

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

    BlockTree: not causal; O(N T (near + samples + 128 H) H) time and, for importance, N T S H / 2.
    Its draws of keys depend on the queries and its seed. No error is estimated here either.

    A normaliser D_i that is not positive (odd or low degree, large scores) makes the output of that
    query NaN, and NaN every gradient that it enters; raise the degree, make it even, or use Exact.
    A query that sees no key gives 0.

    Raises ValueError for shapes or dtypes that do not fit together, for Chain, and for causal
    factors and series other than "taylor": they are fitted to all scores, the future's included.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    exists = jnp.ones(key.shape[:2], bool) if mask is None else jnp.asarray(mask)
    _check_arrays(query, key, value, exists, scale)
    (b, t, n, h), heads = query.shape, key.shape[2]
    # Half precision is computed in float32: features are products of many coordinates.
    dtype = query.dtype if jnp.finfo(query.dtype).bits >= 32 else jnp.float32
    scale = 1 / np.sqrt(h) if scale is None else scale
    q = query.astype(dtype) * jnp.asarray(scale, dtype)
    if is_causal:
        key, value, exists = (_as_long_as(x, t) for x in (key, value, exists))
    # Padding may hold anything, NaN too: zeros in its place.
    k, v = (jnp.where(exists[:, :, None, None], x, 0).astype(dtype) for x in (key, value))
    # Queries that share a key head go together, as one group of the last but one axis.
    one = functools.partial(_head, method, is_causal)
    over_heads = jax.vmap(one, in_axes=(1, 1, 1, None), out_axes=1)
    out = jax.vmap(over_heads)(q.reshape(b, t, heads, n // heads, h), k, v, exists)
    return out.reshape(b, t, n, v.shape[-1]).astype(query.dtype)


def _as_long_as(x: Shaped[Array, "b s *rest"], length: int) -> Shaped[Array, "b length *rest"]:
    """Tokens behind `length` cut off, which no query sees, and missing ones added as zeros."""
    x = x[:, :length]
    missing = (0, length - x.shape[1])
    return jnp.pad(x, [(0, 0), missing, *[(0, 0)] * (x.ndim - 2)])


def _head(method: Method, is_causal: bool, q, k, v, exists) -> jax.Array:
    """One key head and the queries (T, G, H) that read it -> (T, G, Hv)."""
    t, group, h = q.shape
    out = attend(method, is_causal * group, q.reshape(t * group, h), k, v, exists)
    # Methods may put out anything for a query that sees no key.
    seen = jnp.repeat(jnp.cumsum(exists) > 0, group) if is_causal else exists.any()[None]
    return jnp.where(seen[:, None], out, 0).reshape(t, group, -1)


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
    # Grouped-query attention: each key head serves as many query heads.
    if n % heads:
        fail("query", f"{n} heads", f"a multiple of {heads}, the heads of key")
    if exists.shape != (b, s) or exists.dtype != bool:
        fail("mask", f"{exists.dtype} of shape {exists.shape}", f"booleans of shape {(b, s)}")
    if scale is not None and np.ndim(scale) != 0:
        fail("scale", f"shape {np.shape(scale)}", "a scalar")
