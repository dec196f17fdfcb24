"""A factored f~ in moment form, and the chain of Lemmas 3.4 to 3.7 on it without any L x k^2
object.

    f~ = U V^T + E + R       low rank, a few entries a query (E), a few rows written out (R); every row sums to 1
    c~ = f~ V - Y,  rho~_i = c~_i . (f~ V)_i,  p~ = f~ o (c~ V^T - rho~ 1^T)

With [c~, -rho~] =: C and [V, 1] =: H, both of m = d_value + 1 columns, p~ = sum_m diag(C_m) f~
diag(H_m), and what an adapter of rank r < d / 2 needs of p~ are products with few columns, p~ K
itself only for one of higher rank:

    dA_Q = s beta (p~^T X_Q B_Q)^T K          dB_Q = s beta X_Q^T (p~ K A_Q^T)
    dA_K = s beta (p~ X_K B_K)^T Q            dB_K = s beta X_K^T (p~^T Q A_K^T)
    dA_V = s (X_V B_V)^T (f~^T c~)            dB_V = s X_V^T (f~^T c~ A_V^T)

For z of n columns, the low-rank part of p~ z is sum_m diag(C_m) U (V^T diag(H_m) z): moments of k m
n numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.coordinates.frame import rows, sweep
from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, projections, scalars

BLOCK = 512


class Entries(NamedTuple):
    """Entries of f~ beside the low-rank part; queries in blocks of b share which t keys they have
    entries for.

    Queries and keys that do not exist (padding) are numbered L: read as 0, never written.
    """

    query: jax.Array  # (blocks, b) queries of each block
    key: jax.Array  # (blocks, t) keys of each block
    value: jax.Array  # (blocks, b, t) what is added to U V^T there


class Rows(NamedTuple):
    """Rows of f~ written out, beside a low-rank part and entries that are 0 in them."""

    query: jax.Array  # (n,)
    value: jax.Array  # (n, Lk)


class Factor(NamedTuple):
    """f~ = left right^T + entries + rows. Not yet normalised, or normalised, by `normalise`."""

    left: jax.Array  # (Lq, k)
    right: jax.Array  # (Lk, k)
    entries: Entries | None = None
    rows: Rows | None = None


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x, 0 for those that do not exist: (L, ...), (...) -> (..., ...)."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def add_rows(length: int, index: jax.Array, values: jax.Array) -> jax.Array:
    """(length, n): `values` (..., n) added up at the places that `index` (...) names; those past
    the end are lost.
    """
    n = values.shape[-1]
    out = jnp.zeros((length, n), values.dtype)
    return out.at[index.reshape(-1)].add(values.reshape(-1, n), mode="drop")


def scale_rows(factor: Factor, by: jax.Array) -> Factor:
    """diag(by) f~, by (Lq,)."""
    entries = factor.entries
    exact = factor.rows
    if entries is not None:
        entries = entries._replace(value=entries.value * take(by, entries.query)[..., None])
    if exact is not None:
        exact = exact._replace(value=exact.value * by[exact.query][:, None])
    return Factor(factor.left * by[:, None], factor.right, entries, exact)


def drop_rows(factor: Factor, which: jax.Array) -> Factor:
    """The low-rank part and the entries less the rows that `which` (Lq,) marks, whatever was in
    them.
    """
    left = jnp.where(which[:, None], 0, factor.left)
    entries = factor.entries
    if entries is not None:
        there = take(which.astype(left.dtype), entries.query)[..., None] > 0
        entries = entries._replace(value=jnp.where(there, 0, entries.value))
    return Factor(left, factor.right, entries, factor.rows)


def apply(factor: Factor, z: jax.Array) -> jax.Array:
    """f~ z: (Lk, n) -> (Lq, n). O(L k n + Lq t n) time."""
    out = dot(factor.left, dot(factor.right.T, z))
    if factor.entries is not None:
        found = jnp.einsum(
            "bqt,btn->bqn", factor.entries.value, take(z, factor.entries.key), precision="highest"
        )
        out = out + add_rows(out.shape[0], factor.entries.query, found)
    if factor.rows is not None:
        out = out.at[factor.rows.query].add(dot(factor.rows.value, z))
    return out


def apply_transposed(factor: Factor, z: jax.Array) -> jax.Array:
    """f~^T z: (Lq, n) -> (Lk, n). O(L k n + Lq t n) time."""
    out = dot(factor.right, dot(factor.left.T, z))
    if factor.entries is not None:
        found = jnp.einsum(
            "bqt,bqn->btn", factor.entries.value, take(z, factor.entries.query), precision="highest"
        )
        out = out + add_rows(out.shape[0], factor.entries.key, found)
    if factor.rows is not None:
        out = out + dot(factor.rows.value.T, z[factor.rows.query])
    return out


def normalise(factor: Factor) -> tuple[Factor, jax.Array]:
    """(the factor with rows that sum to 1, the row sums that it had (Lq,))."""
    total = apply(factor, jnp.ones((factor.right.shape[0], 1), factor.right.dtype))[:, 0]
    return scale_rows(factor, 1 / total), total


def rows_of(factor: Factor, index: jax.Array) -> jax.Array:
    """Rows `index` (m,) of f~, written out: (m, Lk). O(m (Lk k + Lq)) time."""
    out = dot(factor.left[index], factor.right.T)
    if factor.entries is not None:
        at = factor.entries.query
        t = factor.entries.key.shape[1]
        numbers = jnp.arange(at.size, dtype=jnp.int32)
        place = (
            jnp.zeros(factor.left.shape[0], jnp.int32)
            .at[at.reshape(-1)]
            .set(numbers, mode="drop")[index]
        )
        keys = factor.entries.key[place // at.shape[1]]
        own = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        out = out.at[own, keys].add(factor.entries.value.reshape(-1, t)[place], mode="drop")
    if factor.rows is not None:
        same = index[:, None] == factor.rows.query[None]
        out = out + dot(same.astype(out.dtype), factor.rows.value)
    return out


def weighted(factor: Factor, c: jax.Array, h: jax.Array) -> Factor:
    """The entries and rows of f~ o (c h^T), and no low-rank part; c: (Lq, m), h: (Lk, m)."""
    entries = factor.entries
    exact = factor.rows
    if entries is not None:
        sizes = jnp.einsum(
            "bqm,btm->bqt", take(c, entries.query), take(h, entries.key), precision="highest"
        )
        entries = entries._replace(value=entries.value * sizes)
    if exact is not None:
        exact = exact._replace(value=exact.value * dot(c[exact.query], h.T))
    return Factor(factor.left[:, :0], factor.right[:, :0], entries, exact)


def _moments(a: jax.Array, h: jax.Array, z: jax.Array) -> jax.Array:
    """sum_j a_j (x) h_j (x) z_j: (L, k), (L, m), (L, n) -> (k, m n). O(L k m n) time, O(BLOCK m n)
    memory.
    """

    def body(total, first, fresh):
        left = rows(a, first, BLOCK)
        right = rows(h, first, BLOCK)
        x = jnp.where(fresh[:, None], rows(z, first, BLOCK), 0)
        return total + dot(left.T, (right[:, :, None] * x[:, None, :]).reshape(left.shape[0], -1))

    return sweep(a.shape[0], BLOCK, body, jnp.zeros((a.shape[1], h.shape[1] * z.shape[1]), a.dtype))


def _contract(a: jax.Array, c: jax.Array, moments: jax.Array) -> jax.Array:
    """Row i is sum_m c_im (a_i moments)_m: (L, k), (L, m), (k, m n) -> (L, n). O(L k m n) time."""
    m = c.shape[1]
    n = moments.shape[1] // m
    ones = jnp.tile(
        jnp.eye(n, dtype=a.dtype), (m, 1)
    )  # a sum over a short axis is slow, a product is not

    def body(out, first, fresh):
        del fresh  # a row written twice is written alike
        found = dot(rows(a, first, BLOCK), moments) * jnp.repeat(rows(c, first, BLOCK), n, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(out, dot(found, ones), first, 0)

    return sweep(a.shape[0], BLOCK, body, jnp.zeros((a.shape[0], n), a.dtype))


def kernel(factor: Factor, c: jax.Array, h: jax.Array, z: jax.Array) -> jax.Array:
    """(f~ o (c h^T)) z for z (Lk, n): (Lq, n). c: (Lq, m), h: (Lk, m). O(L k m n + Lq t (m + n))
    time.
    """
    rest = weighted(factor, c, h)
    return _contract(factor.left, c, _moments(factor.right, h, z)) + apply(rest, z)


def kernel_transposed(factor: Factor, c: jax.Array, h: jax.Array, z: jax.Array) -> jax.Array:
    """(f~ o (c h^T))^T z for z (Lq, n): (Lk, n). As `kernel`."""
    rest = weighted(factor, c, h)
    return _contract(factor.right, h, _moments(factor.left, c, z)) + apply_transposed(rest, z)


def _beside(*columns: jax.Array) -> jax.Array:
    return jnp.concatenate(columns, axis=1)


def gradient(problem: LoRAProblem, factor: Factor) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) from a normalised factor of f. Exact where the factor is.

    With m = min(2 r, d): O(L (k m d_value + t (m + d_value) + d_model (d + r))) time,
    O(L (k + t) + k m d_value) memory.
    """
    (scale, beta), names = scalars(problem), problem.adapters
    q, k, v = projections(problem)
    k = k - k.mean(0, keepdims=True)  # p~ 1 = 0: the same gradient, less cancellation
    x = {"query": problem.x_query, "key": problem.x_key, "value": problem.x_value}
    out = apply(factor, v)
    c = out - problem.target
    big_c = _beside(c, -(c * out).sum(1, keepdims=True))
    big_h = _beside(v, jnp.ones_like(v[:, :1]))

    def both(name, back):
        """(dA, dB) from the gradient in Q, K or V, (L, d)."""
        a = names[name].a
        b = names[name].b
        return Adapter(dot(dot(x[name], b).T, back), dot(x[name].T, dot(back, a.T)))

    grads = {}
    scored = [name for name in ("query", "key") if name in names]
    if (
        2 * sum(names[name].a.shape[0] for name in scored) > len(scored) * q.shape[1]
    ):  # d columns are the fewer
        if "query" in names:
            grads["query"] = both("query", beta * kernel(factor, big_c, big_h, k))
        if "key" in names:
            grads["key"] = both("key", beta * kernel_transposed(factor, big_c, big_h, q))
    elif scored:
        left = []
        right = []
        r = 0
        if "query" in names:
            r = names["query"].a.shape[0]
            left.append(dot(x["query"], names["query"].b))
            right.append(dot(k, names["query"].a.T))
        if "key" in names:
            left.append(dot(q, names["key"].a.T))
            right.append(dot(x["key"], names["key"].b))
        on_queries = beta * kernel(factor, big_c, big_h, _beside(*right))
        on_keys = beta * kernel_transposed(factor, big_c, big_h, _beside(*left))
        if "query" in names:
            grads["query"] = Adapter(dot(on_keys[:, :r].T, k), dot(x["query"].T, on_queries[:, :r]))
        if "key" in names:
            grads["key"] = Adapter(dot(on_queries[:, r:].T, q), dot(x["key"].T, on_keys[:, r:]))
    if "value" in names:
        grads["value"] = both("value", apply_transposed(factor, c))
    return 0.5 * (c**2).sum(), jax.tree.map(lambda z: scale * z, {n: grads[n] for n in names})
