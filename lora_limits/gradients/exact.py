"""Exact LoRA gradients: dense, as the paper writes them (corrected), and tiled with memory linear
in L.

With S = beta Q K^T, f = softmax(S) row by row, c = f V - Y and q = c V^T (Lemmas 3.1, 3.2, D.1 to
D.4):

    p1 = f o q,  p2 = diag(rho) f,  rho_j = <f_j, q_j>,  p = p1 - p2
    dl/dQ = beta p K,   dl/dK = beta p^T Q,   dl/dV = f^T c

and `problem.pull_back` carries each to its adapter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, project, projections, pull_back, scalars


def dense_terms(problem: LoRAProblem) -> dict[str, jax.Array]:
    """Every intermediate of Definitions 3.2 to 3.6 as a dense array: f, c, q, rho, p1, p2, p, and
    Q, K, V.

    f, q, p1, p2, p: (Lq, Lk); c: (Lq, d_value); rho: (Lq,). O(Lq Lk (d + d_value)) time, O(Lq Lk)
    memory.
    """
    q_rows, k_rows, v_rows = projections(problem)
    f = jax.nn.softmax(scalars(problem)[1] * dot(q_rows, k_rows.T), axis=-1)
    out = dot(f, v_rows)
    c = out - problem.target
    q = dot(c, v_rows.T)
    rho = (c * out).sum(-1)
    p1 = f * q
    p2 = rho[:, None] * f
    return {
        "Q": q_rows,
        "K": k_rows,
        "V": v_rows,
        "f": f,
        "c": c,
        "q": q,
        "rho": rho,
        "p1": p1,
        "p2": p2,
        "p": p1 - p2,
    }


def dense_gradient(problem: LoRAProblem) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) with L x L matrices. O(Lq Lk (d + d_value)) time and O(Lq Lk)
    memory.
    """
    t = dense_terms(problem)
    beta = scalars(problem)[1]
    rows = {
        "query": lambda: beta * dot(t["p"], t["K"]),
        "key": lambda: beta * dot(t["p"].T, t["Q"]),
        "value": lambda: dot(t["f"].T, t["c"]),
    }
    return 0.5 * (t["c"] ** 2).sum(), {
        n: pull_back(problem, n, rows[n]()) for n in problem.adapters
    }


def _padded(x: jax.Array, block: int) -> jax.Array:
    """(L, d) -> (tiles, block, d), zeros behind the last token."""
    tiles = -(-x.shape[0] // block)
    return jnp.pad(x, ((0, tiles * block - x.shape[0]), (0, 0))).reshape(tiles, block, x.shape[1])


def _row_softmax(q, keys, values, bias):
    """Online softmax of one query tile over all key tiles: (log normaliser (n,), f V (n,
    d_value)).
    """
    dtype = q.dtype

    def step(carry, tile):
        top, total, out = carry
        k, v, b = tile
        s = dot(q, k.T) + b[None, :]
        new = jnp.maximum(top, s.max(-1))
        e = jnp.exp(s - new[:, None])
        shrink = jnp.exp(top - new)
        return (new, total * shrink + e.sum(-1), out * shrink[:, None] + dot(e, v)), None

    n = q.shape[0]
    start = (
        jnp.full(n, jnp.finfo(dtype).min, dtype),
        jnp.zeros(n, dtype),
        jnp.zeros((n, values.shape[-1]), dtype),
    )
    (top, total, out), _ = jax.lax.scan(step, start, (keys, values, bias))
    return top + jnp.log(total), out / total[:, None]


def tiled_gradient(problem: LoRAProblem, block_size: int) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) over block_size x block_size tiles, softmax normalised online.

    Same operations as the dense form plus one more score product; memory O(L (d + d_value) +
    block_size^2).
    Lengths need not be multiples of the block: keys behind the end get score -inf, queries there
    weight 0.
    """
    beta = scalars(problem)[1]
    dtype = problem.dtype
    names = problem.adapters
    lq = problem.x_query.shape[0]
    lk = problem.x_key.shape[0]
    q_rows, k_rows, v_rows = projections(problem)
    bq = min(block_size, lq)
    bk = min(block_size, lk)
    queries = _padded(beta * q_rows, bq)
    targets = _padded(problem.target, bq)
    keys = _padded(k_rows, bk)
    values = _padded(v_rows, bk)
    live = (jnp.arange(queries.shape[0] * bq) < lq).astype(dtype).reshape(-1, bq, 1)
    bias = jnp.where(jnp.arange(keys.shape[0] * bk) < lk, 0.0, jnp.finfo(dtype).min / 2).astype(
        dtype
    )
    bias = bias.reshape(-1, bk)

    def query_tile(carry, tile):
        loss, sums = carry
        q, y, mask = tile
        log_z, out = _row_softmax(q, keys, values, bias)
        c = mask * (out - y)
        rho = (c * out).sum(-1)

        def key_tile(dq, inner):
            k, v, b, sums = inner
            f = jnp.exp(dot(q, k.T) + b[None, :] - log_z[:, None])
            if "value" in sums:
                sums = sums | {"value": sums["value"] + dot(c.T, f)}
            if "query" in names or "key" in names:
                p = f * (dot(c, v.T) - rho[:, None])
                dq = dq + dot(p, k) if "query" in names else dq
                if "key" in sums:
                    sums = sums | {"key": sums["key"] + dot(q.T, p)}
            return dq, sums

        dq, sums = jax.lax.scan(key_tile, jnp.zeros_like(q), (keys, values, bias, sums))
        return (loss + 0.5 * (c**2).sum(), sums), beta * dq

    # token axis last: c^T f is a plain product, f^T c would transpose every tile
    zeros = {"key": jnp.zeros_like(keys.mT), "value": jnp.zeros_like(values.mT)}
    start = (jnp.zeros((), dtype), {n: zeros[n] for n in names if n in zeros})
    (loss, sums), dq = jax.lax.scan(query_tile, start, (queries, targets, live))
    rows = {n: x.mT.reshape(-1, x.shape[1])[:lk] for n, x in sums.items()}
    rows["query"] = dq.reshape(-1, dq.shape[-1])[:lq]
    return loss, {n: pull_back(problem, n, rows[n]) for n in names}


def tiled_loss(problem: LoRAProblem, block_size: int = 512) -> jax.Array:
    """The loss alone, exact, with memory O(L d + block_size^2)."""
    _, k_rows, v_rows = projections(problem)
    lk = k_rows.shape[0]
    block = min(block_size, lk)
    keys = _padded(k_rows, block)
    values = _padded(v_rows, block)
    bias = jnp.where(jnp.arange(keys.shape[0] * block) < lk, 0.0, jnp.finfo(problem.dtype).min / 2)
    bias = bias.astype(problem.dtype).reshape(-1, block)
    q_rows = scalars(problem)[1] * project(problem, "query", problem.x_query)
    bq = min(block_size, q_rows.shape[0])
    out = jax.lax.map(lambda q: _row_softmax(q, keys, values, bias)[1], _padded(q_rows, bq))
    return 0.5 * ((out.reshape(-1, out.shape[-1])[: q_rows.shape[0]] - problem.target) ** 2).sum()
