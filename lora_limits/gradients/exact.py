"""Exact LoRA gradients: dense, as the paper writes them (corrected), and tiled, memory linear in L.

With S = beta Q K^T, f = softmax(S) row by row, c = f V - Y and q = c V^T (Lemmas 3.1, 3.2, D.1 to
D.4):

    p1 = f o q,  p2 = diag(rho) f,  rho_j = <f_j, q_j>,  p = p1 - p2
    dl/dQ = beta p K,   dl/dK = beta p^T Q,   dl/dV = f^T c

and `problem.pull_back` carries each to its adapter.

Tiled, f is never formed. With a shift m_i of each query, e_ij = exp(S_ij - m_i), Z_i = sum_j e_ij
and g_i = c_i / Z_i, whatever the m_i are:

    f V = diag(1 / Z) e V,   p_ij = e_ij (<g_i, v_j> - <g_i, (f V)_i>),   dl/dV = e^T g
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.gradients import exact_masked
from lora_limits.heads.tokens import pattern_of, tokens_of
from lora_limits.heads.visibility import visible_pairs
from lora_limits.linalg import column_norms, dot, row_norms
from lora_limits.problem import Adapter, LoRAProblem, projections, pull_back, scalars
from lora_limits.problem_checks import structure_of

# Fewer queries at once make products too thin for a CPU.
LEAST = 64


def dense_terms(problem: LoRAProblem) -> dict[str, jax.Array]:
    """Every intermediate of Definitions 3.2 to 3.6: f, c, q, rho, p1, p2, p, and Q, K, V, dense.

    f, q, p1, p2, p: (Lq, Lk); c: (Lq, d_value); rho: (Lq,). O(Lq Lk (d + d_value)) time,
    O(Lq Lk) memory.
    """
    q_rows, k_rows, v_rows = projections(problem)
    f = _softmax_rows(problem, scalars(problem)[1] * dot(q_rows, k_rows.T))
    out = dot(f, v_rows)
    c = out - problem.target
    if problem.query_mask is not None:
        # the loss counts the queries that there are
        c = jnp.where(problem.query_mask[:, None], c, 0)
    q = dot(c, v_rows.T)
    rho = (c * out).sum(-1)
    p1 = f * q
    p2 = rho[:, None] * f
    terms = {"Q": q_rows, "K": k_rows, "V": v_rows, "f": f, "c": c, "q": q, "rho": rho}
    return terms | {"p1": p1, "p2": p2, "p": p1 - p2}


def _softmax_rows(problem: LoRAProblem, s: Float[Array, "lq lk"]) -> Float[Array, "lq lk"]:
    """f, over the keys that each query sees; 0 for a query that sees none."""
    if not structure_of(problem):
        return jax.nn.softmax(s, axis=-1)
    seen = visible_pairs(pattern_of(problem), tokens_of(problem))
    # Finite, as -inf less -inf would be NaN.
    s = jnp.where(seen, s, float(jnp.finfo(s.dtype).min))
    return jnp.where(seen, jax.nn.softmax(s, axis=-1), 0)


def dense_gradient(problem: LoRAProblem) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) with L x L matrices: dl/dQ = beta p K, and so on (above).

    O(Lq Lk (d + d_value)) time and O(Lq Lk) memory.
    """
    t = dense_terms(problem)
    beta = scalars(problem)[1]
    rows = {
        "query": lambda: beta * dot(t["p"], t["K"]),
        "key": lambda: beta * dot(t["p"].T, t["Q"]),
        "value": lambda: dot(t["f"].T, t["c"]),
    }
    loss = 0.5 * (t["c"] ** 2).sum()
    return loss, {n: pull_back(problem, n, rows[n]()) for n in problem.adapters}


class _Keys(NamedTuple):
    """A tile of keys and values, both ways round: no product then has to turn an array."""

    k: Float[Array, "... n d"]
    v: Float[Array, "... n dv"]
    k_columns: Float[Array, "... d n"]
    v_columns: Float[Array, "... dv n"]


class _Split(NamedTuple):
    """All keys: every tile but the last, stacked; the last, of the tokens left; max_j |k_j|."""

    before: _Keys
    last: _Keys
    reach: Float[Array, ""]


def _sizes(lq: int, lk: int, block: int, most: int) -> tuple[int, int]:
    """(queries of a strip, keys of a tile), at most block^2 scores.

    Wide tiles if `most` of them take all keys, else square ones: scores of the last tile are not
    computed twice, but strips of fewer queries go over the sums for the keys more often.
    """
    tiles = -(-lk * min(LEAST, block) // block**2)
    tile = -(-lk // tiles) if tiles <= most else block
    strip = min(block, block**2 // tile)
    # whole vectors: products are a quarter slower at 76 queries than at 64
    return min(lq, strip - strip % min(LEAST, strip)), tile


def _strips(x: Float[Array, "tokens c"], size: int) -> Float[Array, "strips size c"]:
    """Tokens in strips of `size`, zeros behind the last one."""
    strips = -(-x.shape[0] // size)
    return jnp.pad(x, ((0, strips * size - x.shape[0]), (0, 0))).reshape(strips, size, x.shape[1])


def _split(k_rows: Float[Array, "lk d"], v_rows: Float[Array, "lk dv"], size: int) -> _Split:
    """Keys and values in tiles of `size` tokens."""
    tiles = (k_rows.shape[0] - 1) // size
    first = tuple(x[: tiles * size].reshape(tiles, size, x.shape[1]) for x in (k_rows, v_rows))
    rest = tuple(x[tiles * size :] for x in (k_rows, v_rows))
    before, last = (_Keys(*x, *(y.mT for y in x)) for x in (first, rest))
    return _Split(before, last, row_norms(k_rows).max())


def _absorb(q, bounded, carry, keys: _Keys):
    """A tile more in m, Z (1, n) and (e V)^T (d_value, n); and e^T of that tile (keys, n)."""
    top, total, out = carry
    # S^T = K Q^T
    s = dot(keys.k, q)
    # m = max_j S_ij, unless the scores are known to be small; f does not depend on m
    new = jax.lax.cond(
        bounded,
        lambda _, top: top,
        lambda s, top: jnp.maximum(top, s.max(0, keepdims=True)),
        jax.lax.stop_gradient(s),
        top,
    )
    # e = exp(S - m)
    e = jnp.exp(s - new)
    # exp(m_before - m)
    shrink = jnp.exp(top - new)
    # Z = sum_j e_ij
    total = shrink * total + e.sum(0, keepdims=True)
    # e V
    out = shrink * out + dot(keys.v_columns, e)
    return (new, total, out), e


def _softmax(q: jax.Array, keys: _Split):
    """Of a strip q (d, n), online: m, Z (1, n), (f V)^T (d_value, n) and e^T of the last tile.

    Scores that max |q_i| max |k_j| keep within a quarter of the range of exponents need no maximum:
    with m = 0, Z is far from overflow and from underflow.
    """
    # |S_ij| <= |q_i| |k_j|
    bound = column_norms(q).max() * keys.reach
    bounded = bound <= jnp.log(jnp.finfo(q.dtype).max) / 4
    row = jnp.zeros_like(q[:1])
    top = row + jnp.where(bounded, 0, jnp.finfo(q.dtype).min).astype(q.dtype)
    start = (top, row, jnp.zeros((keys.last.v.shape[1], q.shape[1]), q.dtype))
    absorb = functools.partial(_absorb, q, bounded)
    carry, _ = jax.lax.scan(lambda c, tile: (absorb(c, tile)[0], None), start, keys.before)
    (top, total, out), e = absorb(carry, keys.last)
    return top, total, out / total, e


def _pull(names, q, g, rho, dq, keys: _Keys, e, sums):
    """What a tile adds to dl/dQ^T / beta (d, n) and to `sums`, its rows of dl/dK and dl/dV.

    q (d, n) with beta in, g = c / Z (d_value, n), rho = <g, f V> (1, n), e^T (keys, n).
    """
    sums = dict(sums)
    if "value" in names:
        # dl/dV = e^T g
        sums["value"] = sums["value"] + dot(e, g.T)
    if "query" in names or "key" in names:
        # p^T = e^T o (V g - rho)
        p = e * (dot(keys.v, g) - rho)
        if "query" in names:
            # (p K)^T
            dq = dq + dot(keys.k_columns, p)
        if "key" in names:
            # beta p^T Q
            sums["key"] = sums["key"] + dot(p, q.T)
    return dq, sums


def _strip_gradient(names, keys: _Split, carry, rows):
    """A strip more in (loss, sums of the tiles before, of the last), and its dl/dQ^T / beta."""
    loss, before, last = carry
    q, y, live = (x.T for x in rows)
    top, total, out, e = _softmax(q, keys)
    # c = f V - Y, 0 for queries behind the end
    c = live * (out - y)
    loss = loss + 0.5 * (c**2).sum()
    # c / Z
    g = c / total
    # rho / Z
    rho = (g * out).sum(0, keepdims=True)
    pull = functools.partial(_pull, names, q, g, rho)
    # the last tile while its e is at hand
    dq, last = pull(jnp.zeros_like(q), keys.last, e, last)

    def again(dq, tile):
        keys, sums = tile
        # e = exp(S - m) once more
        return pull(dq, keys, jnp.exp(dot(keys.k, q) - top), sums)

    dq, before = jax.lax.scan(again, dq, (keys.before, before))
    return (loss, before, last), dq


def tiled_gradient(problem: LoRAProblem, block_size: int) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) over tiles of block_size^2 scores, softmax normalised online.

    dl/dQ = beta p K, dl/dK = beta p^T Q, dl/dV = f^T c; any lengths. The operations of the dense
    form, O(Lq Lk (d + d_value)), and one more score product unless a tile takes all keys, which it
    does if min(64, block_size) Lk <= block_size^2. Memory O(L (d + d_value) + block_size^2).
    Masked or rotary problems: exact_masked.py, a causal one at half the operations.
    """
    if structure_of(problem):
        return exact_masked.gradient(problem, block_size)
    beta = scalars(problem)[1]
    names = problem.adapters
    q_rows, k_rows, v_rows = projections(problem)
    lq = q_rows.shape[0]
    lk = k_rows.shape[0]
    strip, tile = _sizes(lq, lk, block_size, 3 if set(names) == {"query"} else 1)
    live = jnp.ones((lq, 1), problem.dtype)
    strips = tuple(_strips(x, strip) for x in (beta * q_rows, problem.target, live))
    keys = _split(k_rows, v_rows, tile)
    zeros = [{"key": jnp.zeros_like(x.k), "value": jnp.zeros_like(x.v)} for x in keys[:2]]
    sums = ({n: x for n, x in z.items() if n in names} for z in zeros)
    step = functools.partial(_strip_gradient, names, keys)
    start = (jnp.zeros((), problem.dtype), *sums)
    (loss, before, last), dq = jax.lax.scan(step, start, strips)
    # dl/dK, dl/dV: the last tile behind those before
    flat = {n: x.reshape(x.shape[0] * x.shape[1], x.shape[2]) for n, x in before.items()}
    rows = {n: jnp.concatenate([x, last[n]]) for n, x in flat.items()}
    # dl/dQ
    rows["query"] = beta * dq.mT.reshape(-1, dq.shape[1])[:lq]
    return loss, {n: pull_back(problem, n, rows[n]) for n in names}


def tiled_loss(problem: LoRAProblem, block_size: int = 512) -> jax.Array:
    """1/2 || f V - Y ||_F^2 by the forward half of `tiled_gradient`.

    O(Lq Lk (d + d_value)) time, memory O(L (d + d_value) + block_size^2).
    """
    if structure_of(problem):
        return exact_masked.loss(problem, block_size)
    q_rows, k_rows, v_rows = projections(problem)
    strip, tile = _sizes(q_rows.shape[0], k_rows.shape[0], block_size, 1)
    keys = _split(k_rows, v_rows, tile)
    strips = _strips(scalars(problem)[1] * q_rows, strip)
    out = jax.lax.map(lambda q: _softmax(q.T, keys)[2], strips)
    f_v = out.mT.reshape(-1, out.shape[1])[: q_rows.shape[0]]
    return 0.5 * ((f_v - problem.target) ** 2).sum()
