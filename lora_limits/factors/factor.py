"""A factored f~ and the algebra of it: what every way of factoring f returns.

f~ = U V^T + E + R       low rank, a few entries a query (E), a few rows written out (R)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.linalg import PRECISION, dot


class Entries(NamedTuple):
    """Entries of f~ beside the low-rank part.

    Queries come in blocks of b that share which t keys they have entries for. Queries and keys that
    do not exist (padding) are numbered L: read as 0, never written.
    """

    query: Int[Array, "blocks b"]  # queries of each block
    key: Int[Array, "blocks t"]  # keys of each block
    value: Float[Array, "blocks b t"]  # what is added to U V^T there


class Rows(NamedTuple):
    """Rows of f~ written out, beside a low-rank part and entries that are 0 in them."""

    query: Int[Array, " n"]
    value: Float[Array, "n lk"]


class Factor(NamedTuple):
    """f~ = left right^T + entries + rows. Not yet normalised, or normalised, by `normalise`."""

    left: Float[Array, "lq k"]
    right: Float[Array, "lk k"]
    entries: Entries | None = None
    rows: Rows | None = None

    @property
    def width(self) -> int:
        """What a query costs: columns of the low-rank part and entries."""
        return self.left.shape[1] + (0 if self.entries is None else self.entries.key.shape[1])


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x, 0 for those that do not exist: (L, ...), (...) -> (..., ...)."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def add_rows(length: int, index: jax.Array, values: jax.Array) -> Float[Array, "length n"]:
    """`values` (..., n) added up at the places that `index` (...) names.

    Those past the end are lost.
    """
    n = values.shape[-1]
    out = jnp.zeros((length, n), values.dtype)
    return out.at[index.reshape(-1)].add(values.reshape(-1, n), mode="drop")


def scale_rows(factor: Factor, by: Float[Array, " lq"]) -> Factor:
    """diag(by) f~."""
    entries = factor.entries
    exact = factor.rows
    if entries is not None:
        entries = entries._replace(value=entries.value * take(by, entries.query)[..., None])
    if exact is not None:
        exact = exact._replace(value=exact.value * by[exact.query][:, None])
    return Factor(factor.left * by[:, None], factor.right, entries, exact)


def drop_rows(factor: Factor, which: Bool[Array, " lq"]) -> Factor:
    """The low-rank part and the entries less the rows that `which` marks, whatever was in them."""
    left = jnp.where(which[:, None], 0, factor.left)
    entries = factor.entries
    if entries is not None:
        there = take(which.astype(left.dtype), entries.query)[..., None] > 0
        entries = entries._replace(value=jnp.where(there, 0, entries.value))
    return Factor(left, factor.right, entries, factor.rows)


def apply(factor: Factor, z: Float[Array, "lk n"]) -> Float[Array, "lq n"]:
    """f~ z. O(L k n + Lq t n) time."""
    out = dot(factor.left, dot(factor.right.T, z))
    if factor.entries is not None:
        at_keys = take(z, factor.entries.key)
        found = jnp.einsum("bqt,btn->bqn", factor.entries.value, at_keys, precision=PRECISION)
        out = out + add_rows(out.shape[0], factor.entries.query, found)
    if factor.rows is not None:
        out = out.at[factor.rows.query].add(dot(factor.rows.value, z))
    return out


def apply_transposed(factor: Factor, z: Float[Array, "lq n"]) -> Float[Array, "lk n"]:
    """f~^T z. O(L k n + Lq t n) time."""
    out = dot(factor.right, dot(factor.left.T, z))
    if factor.entries is not None:
        at_queries = take(z, factor.entries.query)
        found = jnp.einsum("bqt,bqn->btn", factor.entries.value, at_queries, precision=PRECISION)
        out = out + add_rows(out.shape[0], factor.entries.key, found)
    if factor.rows is not None:
        out = out + dot(factor.rows.value.T, z[factor.rows.query])
    return out


def normalise(
    factor: Factor, asked: Bool[Array, " lq"] | None = None
) -> tuple[Factor, Float[Array, " lq"]]:
    """(the factor with rows that sum to 1, the row sums that it had).

    Rows that are not asked for are left as they are, and said to sum to 1.
    """
    ones = jnp.ones_like(factor.right, shape=(factor.right.shape[0], 1))
    total = apply(factor, ones)[:, 0]
    if asked is not None:
        total = jnp.where(asked, total, 1)
    return scale_rows(factor, 1 / total), total


def rows_of(factor: Factor, index: Int[Array, " m"]) -> Float[Array, "m lk"]:
    """Rows `index` of f~, written out. O(m (Lk k + Lq)) time."""
    out = dot(factor.left[index], factor.right.T)
    if factor.entries is not None:
        at = factor.entries.query
        t = factor.entries.key.shape[1]
        # where each query lies among the blocks
        numbers = jnp.arange(at.size, dtype=jnp.int32)
        nowhere = jnp.zeros(factor.left.shape[0], jnp.int32)
        place = nowhere.at[at.reshape(-1)].set(numbers, mode="drop")[index]
        keys = factor.entries.key[place // at.shape[1]]
        own = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        values = factor.entries.value.reshape(-1, t)[place]
        out = out.at[own, keys].add(values, mode="drop")
    if factor.rows is not None:
        same = index[:, None] == factor.rows.query[None]
        out = out + dot(same.astype(out.dtype), factor.rows.value)
    return out


def weighted(factor: Factor, c: Float[Array, "lq m"], h: Float[Array, "lk m"]) -> Factor:
    """The entries and rows of f~ o (c h^T), and no low-rank part."""
    entries = factor.entries
    exact = factor.rows
    if entries is not None:
        at_queries = take(c, entries.query)
        at_keys = take(h, entries.key)
        sizes = jnp.einsum("bqm,btm->bqt", at_queries, at_keys, precision=PRECISION)
        entries = entries._replace(value=entries.value * sizes)
    if exact is not None:
        exact = exact._replace(value=exact.value * dot(c[exact.query], h.T))
    return Factor(factor.left[:, :0], factor.right[:, :0], entries, exact)
