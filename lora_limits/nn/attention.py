"""Attention for a Flax model: jax.nn.dot_product_attention's layout, by a method of the library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from lora_limits.checks import check_integer, fail
from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis
from lora_limits.heads.visibility import Pattern, Tokens, sees_any
from lora_limits.method import Method
from lora_limits.nn import explicit, heads, padding
from lora_limits.nn.padding import Masks
from lora_limits.nn.reverse import refusal

PLAUSIBLE = 1e4  # what is larger in a query that seems to be padding is read as 0


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    method: Method,
    scale: Any = None,
    is_causal: bool = False,
    mask: Any = None,
    query_mask: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    bias: Any = None,
    return_residual: bool = False,
) -> jax.Array:
    """softmax(scale Q K^T) V for every batch and head, by any method of the library but Chain.

    query: (B, T, N, H); key: (B, S, K, H); value: (B, S, K, Hv), one floating dtype, or all without
    B. Query head n reads key head n // (N / K). scale: a scalar, 1/sqrt(H) by default. is_causal:
    query t sees keys s <= t, whatever T and S are. local_window_size: (left, right), query t sees
    keys t - left to t + right; one integer for both.
    Returns (B, T, N, Hv) in that dtype, computed in at least float32. jit with method, is_causal,
    local_window_size and axis_name static; vmap; reverse-mode derivatives in query, key, value and
    scale, and with Exact or a window forward-mode ones too.

    Padding: mask, (B, S) or (B, 1, 1, S) booleans, or key_value_seq_lengths, (B,) integers, say
    which keys exist; query_mask, (B, T), or query_seq_lengths which queries. What stands in tokens
    that do not exist is never read, nor do they count in what methods make of all tokens; outputs
    of such queries are 0. Without either of the latter, and where T = S, the queries that exist are
    those whose keys do; as this is a guess, Exact and Polynomial answer the others too where they
    are numbers up to 1e4 (factors give 0).
    Documents: query_segment_ids, (B, T) integers; for self-attention alone, where a run of equal
    numbers is a document, else with key_value_segment_ids, (B, S), where equal numbers are.

    Devices: batch and heads may be split anyhow. Tokens may be split by a shard_map that names its
    mesh axes as axis_name, each device giving its part of all arrays, in device order, or by an
    explicit mesh. Polynomial then sums over the keys and queries of each device where they lie, and
    (K k (1 + Hv)) numbers a batch entry cross devices each way, whatever T and S are: summed, or
    gathered from all devices if causal. Exact has all keys and values sent to each device. Factors,
    windows and documents are refused; causal, so are odd degrees on fewer than 128 tokens a device.

    Costs are those of one batch entry; the entries, and the heads, are vmapped. Exact(): O(N T S (H
    + Hv)) time, memory O(N T S); Exact(block_size): memory O(N block_size S), derivative included.
    A window of w keys: O(N T (w + 128) (H + Hv)), exact, whatever the method.

    Polynomial(g): f_ij = w_j P(s_ij) / D_i, queries and keys centred head by head (queries that
    share keys share their centre), k = binom(H + g, g). O((N T + K S) g k (1 + Hv)) time and,
    besides inputs and outputs, O(K k H (1 + Hv) + K block_size (k + H Hv)) memory, derivative
    included: that of this forward, its centres and series held constant. Causal: tokens come in
    blocks of block_size / (N / K); a query reads its own block exactly and the blocks before it
    through P, Taylor's and not centred, so that nothing depends on tokens to come, bit for bit; at
    odd degrees the first 128 tokens of a document are exact, as P may be negative over few keys.
    Packed documents of self-attention in the same way, causal or not (then documents of up to 128
    tokens are exact). Sequences whose keys fit in one such block are computed exactly: block_size
    below S to prevent it. Worth it while scores are small (o(log S), Theorem
    3.1), the more so the higher the degree; no error is certified.

    A factor (Skeleton, SparseLowRank, ...): not causal, no documents; O(N T rank H Hv) time beside
    that of the factor, O(N (T + S) rank) memory. No error is estimated here: `gradient` does that.

    BlockTree: not causal; O(N T (near + samples + 128 H) H) time and, for importance, N T S H / 8.
    Its draws of keys depend on the queries and its seed. No error is estimated here either.

    A normaliser D_i that is not positive (odd or low degree, large scores) makes the output of that
    query NaN, and NaN every gradient that it enters; raise the degree, make it even, or use Exact.
    A query that sees no key gives 0. Causal, in a window or packed, one that sees NaN or infinity
    gives NaN, and others are as if it were not there.

    Raises ValueError for shapes or dtypes that do not fit together, for Chain, for causal factors
    and series other than "taylor": they are fitted to all scores, the future's included; for masks
    of pairs, a bias and a residual, which no factored form has; TypeError for forward-mode
    derivatives of Polynomial and factors, the outer one of jax.hessian (jacfwd of jacrev) too:
    jacrev of jacrev is none.
    """
    if bias is not None:
        fail("bias", "one", "none: it is no function of queries and keys; add coordinates to them")
    if return_residual:
        fail("return_residual", return_residual, "False: approximate normalisers are of no use")
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    batched = any(x.ndim != 3 for x in arrays)
    q, k, v = arrays if batched else [x[None] for x in arrays]
    _check_arrays(q, k, v, scale)
    masks = Masks(
        mask,
        query_mask,
        query_seq_lengths,
        key_value_seq_lengths,
        query_segment_ids,
        key_value_segment_ids,
    )
    if axis_name is not None:
        padding.check_split(masks)
    given = padding.read(masks, q, k)
    pattern = Pattern(
        is_causal=bool(is_causal), window=_window(local_window_size), packed=given.packed
    )
    if pattern.is_local and given.tokens.query_document is not None and not given.packed:
        expected = "query_segment_ids alone, of self-attention, beside is_causal or a window"
        fail("key_value_segment_ids", "another array than query_segment_ids", expected)
    # Half precision is computed in float32: features are products of many coordinates.
    dtype = q.dtype if jnp.finfo(q.dtype).bits >= 32 else jnp.float32
    scale = jnp.asarray(1 / np.sqrt(q.shape[-1]) if scale is None else scale, dtype)
    attend = functools.partial(_attention, method, pattern, given.answered)
    try:
        out = explicit.by_device(attend, axis_name, given.tokens, q, k, v, scale)
    except TypeError as error:
        # Forward mode in a batch is seen by JAX before it is seen by `reverse_only`.
        if "to a custom_vjp function" not in str(error):
            raise
        raise refusal(repr(method)) from error
    return out if batched else out[0]


# One program where nobody else compiles: its parts alone would be hundreds.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attention(
    method: Method, pattern: Pattern, answered: bool, axis: Axis, tokens: Tokens, q, k, v, scale
) -> jax.Array:
    """`attention` of checked arrays. answered: as in Padding; axis: as in Pattern."""
    (b, t, n, h), key_heads = q.shape, k.shape[2]
    # A device may hold some heads of queries and the only one of keys.
    pattern = pattern._replace(group=n // key_heads, axis=axis)
    if pattern.is_causal and axis is None:
        k, v = (_as_long_as(x, t) for x in (k, v))
        tokens = tokens._replace(key=_as_long_as(tokens.key, t))
    # Padding may hold anything, NaN too: zeros in its place.
    there = tokens.query[:, :, None, None]
    readable = there | (jnp.abs(q) <= PLAUSIBLE) if answered else there
    x = jnp.where(readable, q, 0).astype(scale.dtype) * scale
    y, z = (jnp.where(tokens.key[:, :, None, None], a, 0).astype(scale.dtype) for a in (k, v))
    x, y, z, tokens = collectives.varying_alike((x, y, z, tokens))
    # Queries that share a key head go together, as one group of the last but one axis.
    one = functools.partial(_head, method, pattern)
    over_heads = jax.vmap(one, in_axes=(None, 1, 1, 1), out_axes=1)
    out = jax.vmap(over_heads)(tokens, x.reshape(b, t, key_heads, pattern.group, h), y, z)
    out = out.reshape(b, t, n, v.shape[-1])
    kept = there | jnp.isfinite(out) if answered else there
    return jnp.where(kept, out, 0).astype(q.dtype)


def _as_long_as(x: Shaped[Array, "b s *rest"], length: int) -> Shaped[Array, "b length *rest"]:
    """Tokens behind `length` cut off, which no query sees, and missing ones added as zeros."""
    x = x[:, :length]
    missing = (0, length - x.shape[1])
    return jnp.pad(x, [(0, 0), missing, *[(0, 0)] * (x.ndim - 2)])


def _head(method: Method, pattern: Pattern, tokens: Tokens, q, k, v) -> jax.Array:
    """One key head and the queries (T, G, H) that read it -> (T, G, Hv)."""
    t, group, h = q.shape
    bad_key = ~(jnp.isfinite(k).all(1) & jnp.isfinite(v).all(1))
    bad_query = ~jnp.isfinite(q).all(2)
    apart = pattern.is_local or pattern.packed
    if apart:
        # 0 times NaN is NaN: what is not finite must not be in sums from which it is masked out.
        k, v = (jnp.where(bad_key[:, None], 0, x) for x in (k, v))
        q = jnp.where(bad_query[:, :, None], 0, q)
    out = heads.head(method, pattern, tokens, q.reshape(t * group, h), k, v)
    out = out.reshape(t, group, -1)
    if apart:
        lost = sees_any(pattern, tokens, bad_key, t)[:, None] | bad_query
        out = jnp.where(lost[:, :, None], jnp.nan, out)
    if tokens.query_document is not None and not pattern.packed:
        return out
    # Methods may put out anything for a query that sees no key.
    seen = sees_any(pattern, tokens, tokens.key, t)
    return jnp.where(seen[:, None, None], out, 0)


def _window(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    left, right = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    name = "local_window_size"
    return check_integer(name, left, 0), check_integer(name, right, 0)


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array, scale: Any) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or 0 in x.shape:
            fail(name, f"shape {x.shape}", "(batch, tokens, heads, width), none of them 0")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            fail(name, f"dtype {x.dtype}", "a floating dtype")
        if x.dtype != query.dtype:
            fail(name, f"dtype {x.dtype}", f"{query.dtype}, the dtype of query")
    (b, _, n, h), (s, key_heads) = query.shape, key.shape[1:3]
    if key.shape != (b, s, key_heads, h):
        fail("key", f"shape {key.shape}", f"({b}, tokens, heads, {h}) to fit query {query.shape}")
    if value.shape[:3] != (b, s, key_heads):
        expected = f"({b}, {s}, {key_heads}, width) to fit key {key.shape}"
        fail("value", f"shape {value.shape}", expected)
    # Grouped-query attention: each key head serves as many query heads.
    if n % key_heads:
        fail("query", f"{n} heads", f"a multiple of {key_heads}, the heads of key")
    if scale is not None and np.ndim(scale) != 0:
        fail("scale", f"shape {np.shape(scale)}", "a scalar")
