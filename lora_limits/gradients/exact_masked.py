"""Exact LoRA gradients where not every query sees every key: tiles of scores, linear memory.

As in exact.py with f 0 for the pairs that do not see each other. Causality and a window say before
anything runs which tiles of block x block scores hold a pair that does: a list of (queries, keys)
that two scans run over, the first for the softmax, the second for the gradient. So a causal
gradient costs half of a full one and a window a band; masks and documents cost nothing less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lora_limits.heads.tokens import pattern_of, tokens_of
from lora_limits.heads.visibility import Pattern, visible
from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, inputs, projections, pull_back, scalars


class _Queries(NamedTuple):
    """All queries in blocks, or one block of them."""

    q: Float[Array, "*blocks n d"]  # with beta in
    target: Float[Array, "*blocks n dv"]
    asked: Bool[Array, "*blocks n"]
    document: Int[Array, "*blocks n"] | None


class _Keys(NamedTuple):
    """All keys in blocks, or one block of them."""

    k: Float[Array, "*blocks n d"]
    v: Float[Array, "*blocks n dv"]
    exists: Bool[Array, "*blocks n"]
    document: Int[Array, "*blocks n"] | None


class _Softmax(NamedTuple):
    """Of a block of queries, online: f_ij = exp(S_ij - top_i) / total_i."""

    top: Float[Array, "*blocks n 1"]
    total: Float[Array, "*blocks n 1"]
    out: Float[Array, "*blocks n dv"]  # f V, over the keys so far


class _Tiles(NamedTuple):
    """What both scans read. pairs: (block of queries, of keys, whether it is the first of its
    queries).
    """

    queries: _Queries
    keys: _Keys
    pattern: Pattern
    block: int
    pairs: tuple[Int[Array, " t"], Int[Array, " t"], Bool[Array, " t"]]


def visible_tiles(pattern: Pattern, lq: int, lk: int, block: int) -> Int[np.ndarray, "tiles 2"]:
    """(block of queries, block of keys) of every tile that positions leave a pair to see in."""
    i, j = np.mgrid[: -(-lq // block), : -(-lk // block)].reshape(2, -1)
    seen = np.ones(i.shape, bool)
    if pattern.is_causal:
        seen &= j <= i
    if pattern.window is not None:
        # the last key of the block against the first that its first query sees
        seen &= (j + 1) * block - 1 >= i * block - pattern.window[0]
    return np.stack([i[seen], j[seen]], 1).astype(np.int32)


def _tiles(problem: LoRAProblem, block: int) -> _Tiles:
    q, k, v = projections(problem)
    tokens = tokens_of(problem)
    pattern = pattern_of(problem)
    lq, lk = q.shape[0], k.shape[0]
    block = min(block, max(lq, lk))

    def split(x: jax.Array) -> jax.Array:
        missing = -x.shape[0] % block
        padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, block, *x.shape[1:])

    queries = _Queries(scalars(problem)[1] * q, problem.target, tokens.query, tokens.query_document)
    keys = _Keys(k, v, tokens.key, tokens.key_document)
    pairs = visible_tiles(pattern, lq, lk, block)
    first = np.diff(pairs[:, 0], prepend=-1) != 0
    listed = (jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]), jnp.asarray(first))
    return _Tiles(jax.tree.map(split, queries), jax.tree.map(split, keys), pattern, block, listed)


def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, values: Any, i: jax.Array) -> Any:
    def put(x, value):
        return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)

    return jax.tree.map(put, tree, values)


def _scores(tiles: _Tiles, i: jax.Array, j: jax.Array):
    """(queries, keys, their scores, `_unseen` for the pairs that do not see each other)."""
    queries, keys = _at(tiles.queries, i), _at(tiles.keys, j)
    steps = jnp.arange(tiles.block, dtype=jnp.int32)
    position, at = i * tiles.block + steps, j * tiles.block + steps
    seen = visible(tiles.pattern, position, at, keys.exists, queries.document, keys.document)
    s = dot(queries.q, keys.k.T)
    return queries, keys, jnp.where(seen, s, _unseen(s.dtype))


def _unseen(dtype: Any) -> float:
    """A score so far below the least of all tops, half of it, that its exponential is 0."""
    return float(jnp.finfo(dtype).min)


def _softmax(tiles: _Tiles) -> _Softmax:
    """First scan: the softmax of every query, and its output; 0 for a query that sees no key."""
    blocks, n = tiles.queries.q.shape[:2]
    dv = tiles.keys.v.shape[2]
    dtype = tiles.queries.q.dtype
    least = _unseen(dtype) / 2
    nothing = _Softmax(
        jnp.full((n, 1), least, dtype), jnp.zeros((n, 1), dtype), jnp.zeros((n, dv), dtype)
    )

    def absorb(carry, pair):
        i, j, first = pair
        before, every = carry
        before = jax.tree.map(lambda x, y: jnp.where(first, x, y), nothing, before)
        _, keys, s = _scores(tiles, i, j)
        # f does not depend on top
        largest = jax.lax.stop_gradient(s).max(1, keepdims=True)
        top = jnp.maximum(before.top, largest)
        e = jnp.exp(s - top)
        shrink = jnp.exp(before.top - top)
        total = shrink * before.total + e.sum(1, keepdims=True)
        so_far = _Softmax(top, total, shrink * before.out + dot(e, keys.v))
        return (so_far, _put(every, so_far, i)), None

    every = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), dtype), nothing)
    found = jax.lax.scan(absorb, (nothing, every), tiles.pairs)[0][1]
    total = jnp.where(found.total > 0, found.total, 1)
    return found._replace(total=total, out=found.out / total)


def _residual(tiles: _Tiles, f: _Softmax) -> Float[Array, "blocks n dv"]:
    """c = f V - Y of the queries that there are, 0 of the others."""
    return jnp.where(tiles.queries.asked[..., None], f.out - tiles.queries.target, 0)


def gradient(problem: LoRAProblem, block: int) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) over the tiles that are seen, scores computed twice.

    O(pairs in these tiles (d + d_value)) time, O(L (d + d_value) + block^2) memory.
    """
    names = problem.adapters
    tiles = _tiles(problem, block)
    f = _softmax(tiles)
    c = _residual(tiles, f)
    # c / Z and rho / Z
    g = c / f.total
    rho = (g * f.out).sum(-1, keepdims=True)

    def pull(sums, pair):
        i, j, _ = pair
        queries, keys, s = _scores(tiles, i, j)
        g_i, rho_i = _at((g, rho), i)
        e = jnp.exp(s - _at(f.top, i))
        p = e * (dot(g_i, keys.v.T) - rho_i)
        more = {
            "query": (i, lambda: dot(p, keys.k)),
            "key": (j, lambda: dot(p.T, queries.q)),
            "value": (j, lambda: dot(e.T, g_i)),
        }
        added = {}
        for name, total in sums.items():
            at, rows = more[name]
            added[name] = _put(total, _at(total, at) + rows(), at)
        return added, None

    shapes = {"query": tiles.queries.q, "key": tiles.keys.k, "value": tiles.keys.v}
    start = {name: jnp.zeros_like(shapes[name]) for name in names}
    sums = jax.lax.scan(pull, start, tiles.pairs)[0]
    lengths = {name: x.shape[0] for name, x in inputs(problem).items()}
    flat = {n: x.reshape(-1, x.shape[2])[: lengths[n]] for n, x in sums.items()}
    if "query" in flat:
        flat["query"] = scalars(problem)[1] * flat["query"]
    return 0.5 * (c**2).sum(), {name: pull_back(problem, name, flat[name]) for name in names}


def loss(problem: LoRAProblem, block: int) -> jax.Array:
    """1/2 || f V - Y ||_F^2 over the queries that there are, by the first scan of `gradient`."""
    tiles = _tiles(problem, block)
    return 0.5 * (_residual(tiles, _softmax(tiles)) ** 2).sum()
