"""The gradient through a factor of f: the chain of Lemmas 3.4 to 3.7 without any L x k^2 object.

    c~ = f~ V - Y,   rho~_i = c~_i . (f~ V)_i,   p~ = f~ o (c~ V^T - rho~ 1^T)

With [c~, -rho~] =: C and [V, 1] =: H, both of m = d_value + 1 columns,

    p~ = sum_m diag(C_m) f~ diag(H_m)

and what an adapter of rank r < d / 2 needs of p~ are products with few columns, p~ K itself only
for one of higher rank:

    dA_Q = s beta (p~^T X_Q B_Q)^T K          dB_Q = s beta X_Q^T (p~ K A_Q^T)
    dA_K = s beta (p~ X_K B_K)^T Q            dB_K = s beta X_K^T (p~^T Q A_K^T)
    dA_V = s (X_V B_V)^T (f~^T c~)            dB_V = s X_V^T (f~^T c~ A_V^T)

For z of n columns, the low-rank part of p~ z is sum_m diag(C_m) U (V^T diag(H_m) z): moments of
k m n numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.factors.factor import Factor, apply, apply_transposed, weighted
from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, inputs, projections, pull_back, scalars
from lora_limits.problem_checks import refuse_structure

BLOCK = 512


def _moments(
    a: Float[Array, "tokens k"], h: Float[Array, "tokens m"], z: Float[Array, "tokens n"]
) -> Float[Array, "k m_times_n"]:
    """sum_j a_j (x) h_j (x) z_j. O(L k m n) time, O(BLOCK m n) memory."""

    def body(total, first, fresh):
        left = rows(a, first, BLOCK)
        right = rows(h, first, BLOCK)
        x = jnp.where(fresh[:, None], rows(z, first, BLOCK), 0)
        both = (right[:, :, None] * x[:, None, :]).reshape(left.shape[0], -1)
        return total + dot(left.T, both)

    start = jnp.zeros((a.shape[1], h.shape[1] * z.shape[1]), a.dtype)
    return sweep(a.shape[0], BLOCK, body, start)


def _contract(
    a: Float[Array, "tokens k"], c: Float[Array, "tokens m"], moments: Float[Array, "k m_times_n"]
) -> Float[Array, "tokens n"]:
    """Row i is sum_m c_im (a_i moments)_m. O(L k m n) time."""
    m = c.shape[1]
    n = moments.shape[1] // m
    # a sum over a short axis is slow, a product is not
    ones = jnp.tile(jnp.eye(n, dtype=a.dtype), (m, 1))

    def body(out, first, fresh):
        del fresh  # a row written twice is written alike
        each = dot(rows(a, first, BLOCK), moments)
        found = each * jnp.repeat(rows(c, first, BLOCK), n, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(out, dot(found, ones), first, 0)

    return sweep(a.shape[0], BLOCK, body, jnp.zeros((a.shape[0], n), a.dtype))


def kernel(
    factor: Factor,
    c: Float[Array, "lq m"],
    h: Float[Array, "lk m"],
    z: Float[Array, "lk n"],
) -> Float[Array, "lq n"]:
    """(f~ o (c h^T)) z. O(L k m n + Lq t (m + n)) time."""
    rest = weighted(factor, c, h)
    return _contract(factor.left, c, _moments(factor.right, h, z)) + apply(rest, z)


def kernel_transposed(
    factor: Factor,
    c: Float[Array, "lq m"],
    h: Float[Array, "lk m"],
    z: Float[Array, "lq n"],
) -> Float[Array, "lk n"]:
    """(f~ o (c h^T))^T z. As `kernel`."""
    rest = weighted(factor, c, h)
    return _contract(factor.right, h, _moments(factor.left, c, z)) + apply_transposed(rest, z)


def with_ones(v: Float[Array, "n dv"]) -> Float[Array, "n dv_and_1"]:
    """H = [V, 1]."""
    return jnp.concatenate([v, jnp.ones_like(v[:, :1])], 1)


def with_rho(c: Float[Array, "n dv"], out: Float[Array, "n dv"]) -> Float[Array, "n dv_and_1"]:
    """C = [c~, -rho~], rho~ = c~ . out."""
    return jnp.concatenate([c, -(c * out).sum(1, keepdims=True)], 1)


def factored_gradient(
    problem: LoRAProblem, factor: Factor
) -> tuple[Float[Array, ""], dict[str, Adapter]]:
    """(loss, adapter gradients) from a normalised factor of f. Exact where the factor is.

    With m = min(2 r, d): O(L (k m d_value + t (m + d_value) + d_model (d + r))) time,
    O(L (k + t) + k m d_value) memory.
    """
    refuse_structure(problem, "a gradient through a factor")
    beta = scalars(problem)[1]
    adapters = problem.adapters
    q, k, v = projections(problem)
    # p~ 1 = 0: centred keys give the same gradient with less cancellation
    k = k - k.mean(0, keepdims=True)
    out = apply(factor, v)
    c = out - problem.target
    big_c = with_rho(c, out)
    big_h = with_ones(v)
    scored = [name for name in ("query", "key") if name in adapters]
    ranks = sum(adapters[name].a.shape[0] for name in scored)
    found = {}
    if 2 * ranks > len(scored) * q.shape[1]:  # the d columns of K and Q are the fewer
        if "query" in adapters:
            dq = beta * kernel(factor, big_c, big_h, k)
            found["query"] = pull_back(problem, "query", dq)
        if "key" in adapters:
            dk = beta * kernel_transposed(factor, big_c, big_h, q)
            found["key"] = pull_back(problem, "key", dk)
    elif scored:
        found = _by_adapters(problem, factor, big_c, big_h, q, k)
    if "value" in adapters:
        found["value"] = pull_back(problem, "value", apply_transposed(factor, c))
    return 0.5 * (c**2).sum(), {name: found[name] for name in adapters}


def _by_adapters(problem: LoRAProblem, factor: Factor, big_c, big_h, q, k) -> dict[str, Adapter]:
    """dA and dB of query and key through p~ times the adapters' own few columns, all at once."""
    on = adapter_columns(problem, q, k)
    for_queries = kernel(factor, big_c, big_h, on.keys)
    for_keys = kernel_transposed(factor, big_c, big_h, on.queries)
    return from_columns(problem, q, k, for_queries, for_keys)


class AdapterColumns(NamedTuple):
    """All that the adapters of query and key need of p is p times `keys` and p^T times `queries`.

    The first columns, as many as its rank, are the query adapter's, the others the key adapter's.
    """

    queries: Float[Array, "lq m"]  # [X_Q B_Q, Q A_K^T]
    keys: Float[Array, "lk m"]  # [K A_Q^T, X_K B_K]


def adapter_columns(problem: LoRAProblem, q: Float[Array, "lq d"], k: Float[Array, "lk d"]):
    """Those of a problem; without columns where it has neither adapter."""
    adapters = problem.adapters
    x = inputs(problem)
    of_queries, of_keys = [q[:, :0]], [k[:, :0]]
    if "query" in adapters:
        of_queries.append(dot(x["query"], adapters["query"].b))
        of_keys.append(dot(k, adapters["query"].a.T))
    if "key" in adapters:
        of_queries.append(dot(q, adapters["key"].a.T))
        of_keys.append(dot(x["key"], adapters["key"].b))
    return AdapterColumns(jnp.concatenate(of_queries, 1), jnp.concatenate(of_keys, 1))


def from_columns(
    problem: LoRAProblem,
    q: Float[Array, "lq d"],
    k: Float[Array, "lk d"],
    for_queries: Float[Array, "lq m"],
    for_keys: Float[Array, "lk m"],
) -> dict[str, Adapter]:
    """dA and dB of query and key from p and p^T times `adapter_columns`."""
    scale, beta = scalars(problem)
    adapters = problem.adapters
    x = inputs(problem)
    r = adapters["query"].a.shape[0] if "query" in adapters else 0
    found = {}
    if "query" in adapters:
        half_a = dot(for_keys[:, :r].T, k)
        half_b = dot(x["query"].T, for_queries[:, :r])
        found["query"] = Adapter(half_a, half_b)
    if "key" in adapters:
        half_a = dot(for_queries[:, r:].T, q)
        half_b = dot(x["key"].T, for_keys[:, r:])
        found["key"] = Adapter(half_a, half_b)
    return jax.tree.map(lambda z: scale * beta * z, found)
