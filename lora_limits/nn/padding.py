"""Which tokens exist, read from masks and lengths in the layouts of jax.nn.dot_product_attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from lora_limits.checks import fail
from lora_limits.heads.visibility import Tokens

PAIRS = (
    "a mask of keys, (batch, keys) or (batch, 1, 1, keys): pairs are told apart by is_causal, "
    "local_window_size and segment ids"
)


class Masks(NamedTuple):
    """What a call says of its tokens, as it was given."""

    mask: Any
    query_mask: Any
    query_seq_lengths: Any
    key_value_seq_lengths: Any
    query_segment_ids: Any
    key_value_segment_ids: Any


class Padding(NamedTuple):
    """The tokens of a batch."""

    tokens: Tokens  # each array with a batch axis in front
    answered: bool  # whether queries that are taken for padding are answered all the same
    packed: bool  # as in Pattern


def read(masks: Masks, query: Shaped[Array, "b t n h"], key: Shaped[Array, "b s k h"]) -> Padding:
    """What `masks` say of the tokens of query and key.

    Keys exist where `mask` and the lengths of the keys say so. Queries exist where `query_mask` and
    their own lengths say so, and if neither is given, and there are as many queries as keys, where
    keys do: self-attention is the usual case. It is a guess all the same, and so they are answered.
    Raises ValueError for what does not fit, and for masks of pairs.
    """
    keys = _both(
        None if masks.mask is None else _key_mask(masks.mask, key),
        _within("key_value_seq_lengths", masks.key_value_seq_lengths, key),
    )
    queries = _both(
        None if masks.query_mask is None else _of_tokens("query_mask", masks.query_mask, query),
        _within("query_seq_lengths", masks.query_seq_lengths, query),
    )
    answered = queries is None
    if queries is None and query.shape[1] == key.shape[1]:
        queries = keys
    own, other, packed = _documents(masks, query, key)
    tokens = Tokens(_or_all(queries, query), _or_all(keys, key), own, other)
    return Padding(tokens, answered, packed)


def check_split(masks: Masks) -> None:
    """Raises ValueError for what is counted from the first token of all devices."""
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if getattr(masks, name) is not None:
            fail(f"{name} with axis_name", "lengths", "None, and a mask of this device's tokens")


def _or_all(exists: Any, x: Shaped[Array, "b l n h"]) -> Bool[Array, "b l"]:
    """`exists`, or ones where nothing was given, laid out over devices as x is."""
    # Made from x, not sliced from it: heads may be split over devices.
    return ~jnp.zeros_like(x, bool).any((2, 3)) if exists is None else exists


def _both(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _key_mask(mask: Any, key: Shaped[Array, "b s k h"]) -> Bool[Array, "b s"]:
    """A mask of keys in any layout: (S), (B, S), (1, 1, S), (B, 1, 1, S), or with 1 for B."""
    mask = jnp.asarray(mask)
    b, s = key.shape[:2]
    if mask.dtype != bool:
        fail("mask", f"{mask.dtype} of shape {mask.shape}", f"booleans of shape {(b, s)}")
    *front, last = mask.shape or (0,)
    if len(front) > 1:
        # Of (heads, queries, keys), alone or behind the batch.
        batch, pairs = front[:-2], front[-2:]
        if any(size != 1 for size in pairs) and last == s:
            fail("mask", f"bool of shape {mask.shape}", PAIRS)
        front = batch
    if len(front) > 1 or last != s or any(size not in (1, b) for size in front):
        fail("mask", f"bool of shape {mask.shape}", f"booleans of shape {(b, s)}")
    return jnp.broadcast_to(mask.reshape(*front, s) if front else mask.reshape(1, s), (b, s))


def _of_tokens(name: str, mask: Any, x: Shaped[Array, "b l n h"]) -> Bool[Array, "b l"]:
    mask = jnp.asarray(mask)
    b, length = x.shape[:2]
    if mask.dtype != bool or mask.shape not in ((length,), (1, length), (b, length)):
        expected = f"booleans of shape {(b, length)}"
        fail(name, f"{mask.dtype} of shape {mask.shape}", expected)
    return jnp.broadcast_to(mask.reshape(-1, length), (b, length))


def _within(name: str, lengths: Any, x: Shaped[Array, "b l n h"]) -> Bool[Array, "b l"] | None:
    """Which tokens lie within lengths (B,)."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    b, length = x.shape[:2]
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (b,):
        fail(name, f"{lengths.dtype} of shape {lengths.shape}", f"integers of shape {(b,)}")
    return jnp.arange(length, dtype=lengths.dtype)[None] < lengths[:, None]


def _documents(
    masks: Masks, query: Shaped[Array, "b t n h"], key: Shaped[Array, "b s k h"]
) -> tuple[Int[Array, "b t"] | None, Int[Array, "b s"] | None, bool]:
    """(documents of queries, of keys, whether they are runs of the same tokens)."""
    own, other = masks.query_segment_ids, masks.key_value_segment_ids
    if own is None:
        if other is not None:
            fail("query_segment_ids", None, "integers, where key_value_segment_ids are given")
        return None, None, False
    ids = _ids("query_segment_ids", own, query)
    if other is not None and other is not own:
        return ids, _ids("key_value_segment_ids", other, key), False
    if query.shape[1] != key.shape[1]:
        expected = (
            f"integers of shape {key.shape[:2]}, as there are more or fewer keys than queries"
        )
        fail("key_value_segment_ids", other, expected)
    # Two runs of one number are two documents.
    new = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    run = jnp.cumsum(new, axis=1, dtype=jnp.int32)
    return run, run, True


def _ids(name: str, ids: Any, x: Shaped[Array, "b l n h"]) -> Int[Array, "b l"]:
    ids = jnp.asarray(ids)
    b, length = x.shape[:2]
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape not in ((length,), (b, length)):
        fail(name, f"{ids.dtype} of shape {ids.shape}", f"integers of shape {(b, length)}")
    return jnp.broadcast_to(ids.reshape(-1, length), (b, length))
