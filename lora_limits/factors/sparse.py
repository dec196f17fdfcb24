"""f as a few large entries a query, exact, and a low-rank rest: what reaches heads that no low rank
alone does.

In the frame of `frame.py`, s_ij = x_i . y_j + log w_j and f = softmax(s). Four steps, no L x L
object in any:

    search    queries in blocks of like ones share a set of t keys. The centres of a few like blocks are scored against
              the centres of leaves of like keys, then against the keys of the best leaves; the best
              of these are scored against every query of each block, which takes the keys of the
              largest summed f.
    cap       tau_i = the largest score found for query i outside its set. The rest is low rank because
              e_ij = exp(min(s_ij, tau_i)) is: no hole where entries are taken out, no peak that was
              missed.
    columns   V: top right singular vectors of p sampled rows of e, each over its sum of exp(s).
    rows      U_i: weighted least squares of e_ij on V_j over m sampled keys j, drawn by their leverage.

    f~_ij = (U V^T)_ij, or exp(s_ij) for j in the set of i; the worst rows, by the misfit on the
    sampled keys, are computed exactly; every row is divided by its sum.

Nothing is certified: what is returned is checked by an estimate of the error from sampled rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.checks import check_integer
from lora_limits.coordinates import frame as frames
from lora_limits.factors.factor import Entries, Factor, Rows, apply, drop_rows, take
from lora_limits.factors.scores import NOWHERE
from lora_limits.linalg import dot

BLOCK = 512
LEAF = 16  # tokens to a leaf of either tree, at least; at most twice as many
TOGETHER = 4  # blocks of queries that share candidates, a power of two
REACH = (
    32  # keys of the best leaves, for each entry kept: scored against the centres of those blocks
)
CANDIDATES = 6  # of these, scored against every query
SAMPLES = 4  # sampled rows, for each column of the low-rank part
COLUMNS = 4  # sampled keys, likewise
GRAM = 2048  # columns on which the sampled rows are compared with each other
REPAIRED = 128  # rows computed exactly, but no more than every sixteenth
ITERATIONS = 2  # of the subspace iteration
RIDGE = 1e-5
NEGLIGIBLE = 20  # a score this far below the largest of its query


@dataclasses.dataclass(frozen=True)
class SparseLowRank:
    """f as `entries` exact entries a query plus a factor of `rank` columns for the rest.

    O(L (rank^2 + (entries + rank) d)) time, but for a factor log L of two trees and a term L^2 d /
    256 of their leaves. No guarantee: `estimate` and `failed` say how it went. seed: of the sampled
    rows and keys. Raises ValueError for entries or rank that are not integers of at least 1.
    """

    entries: int
    rank: int
    seed: int = 0

    def __post_init__(self):
        check_integer("SparseLowRank entries", self.entries, 1)
        check_integer("SparseLowRank rank", self.rank, 1)


def tree(points: jax.Array, leaf: int) -> jax.Array:
    """Indices of points (n, d) in leaves of like points: (leaves, size), leaf <= size <= 2 leaf, n
    for padding.

    Halves at the median along the direction of largest spread, found by a few power iterations. O(n
    d log n).
    """
    n = points.shape[0]
    levels = max(0, int(math.log2(n / leaf))) if n > leaf else 0
    leaves = 2**levels
    size = -(-n // 2**levels)
    numbers = jnp.arange(leaves, dtype=jnp.int32)

    def halve(order, level):
        # a node is a run of `width` leaves: the same shapes at every level, so that one program
        # serves all
        width = leaves >> level
        first = numbers // width * width

        def over_node(x):
            sums = jnp.concatenate([jnp.zeros_like(x[:1]), jnp.cumsum(x, axis=0)])
            return sums[first + width] - sums[first]

        z = take(points, order)
        z = z - over_node(z.mean(1))[:, None] / width.astype(z.dtype)
        direction = z[first, 0] + 1e-3
        for _ in range(2):
            along = jnp.einsum("pnd,pd->pn", z, direction)
            direction = over_node(jnp.einsum("pnd,pn->pd", z, along))
            top = jnp.abs(direction).max(1, keepdims=True)
            direction = direction / jnp.where(top > 0, top, 1)
        along = jnp.einsum("pnd,pd->pn", z, direction).reshape(-1)
        node = jnp.repeat(first, size, total_repeat_length=along.shape[0])
        return jax.lax.sort((node, along, order.reshape(-1)), num_keys=2)[2].reshape(
            order.shape
        ), None

    order = jnp.arange(size * leaves, dtype=jnp.int32).reshape(leaves, size)
    order = jnp.where(order < n, order, n)
    return jax.lax.scan(halve, order, jnp.arange(levels, dtype=jnp.int32))[0] if levels else order


class Found(NamedTuple):
    """What the search found."""

    query: jax.Array  # (blocks, b)
    key: jax.Array  # (blocks, t)
    score: jax.Array  # (blocks, b, t) s there, NOWHERE for a key that does not exist
    cap: jax.Array  # (blocks, b) tau_i
    order: jax.Array  # (leaves size,) keys, like ones side by side


def search(x: jax.Array, y: jax.Array, entries: int) -> Found:
    """The t = min(entries, Lk) keys of each block of queries that have the largest f there, as far
    as leaves tell.
    """
    queries = tree(x[:, :-1], LEAF)
    leaves = tree(y[:, :-1], LEAF)
    size = leaves.shape[1]
    t = min(entries, y.shape[0])
    near = min(-(-REACH * t // size), leaves.shape[0])
    candidates = min(CANDIDATES * t, near * size)
    exists = leaves < y.shape[0]
    centre = take(y[:, :-1], leaves).sum(1) / jnp.maximum(exists.sum(1), 1)[:, None].astype(y.dtype)
    log_w = jax.nn.logsumexp(jnp.where(exists, take(y[:, -1], leaves), NOWHERE), axis=1)
    centre = jnp.concatenate([centre, log_w[:, None]], 1)

    def near_ones(blocks):
        """Keys that some block of a few like ones (g, b) may want."""
        here = take(x, blocks)
        means = here.sum(1) / jnp.maximum(here[:, :, -1:].sum(1), 1)
        best = jax.lax.top_k(dot(centre, means.T).max(1), near)[1]
        keys = leaves[best].reshape(-1)
        rough = jnp.where(keys < y.shape[0], dot(take(y, keys), means.T).max(1), NOWHERE)
        return keys[jax.lax.top_k(rough, candidates)[1]]

    def block(index, keys):
        here = take(x, index)
        s = jnp.where(keys[None] < y.shape[0], dot(here, take(y, keys).T), NOWHERE)
        f = jax.nn.softmax(s, axis=1) * here[:, -1:]
        chosen = jax.lax.top_k(f.sum(0), min(t, s.shape[1]))[1]
        rest = s.at[:, chosen].set(NOWHERE).max(1)
        # where nothing is left out, what the low-rank part does is negligible whatever it is
        return keys[chosen], s[:, chosen], jnp.maximum(rest, s.max(1) - NEGLIGIBLE)

    def group(blocks):
        keys = near_ones(blocks)
        return jax.vmap(lambda index: block(index, keys))(blocks)

    together = min(TOGETHER, queries.shape[0])
    found = jax.lax.map(group, queries.reshape(-1, together, queries.shape[1]), batch_size=4)
    key, score, cap = (z.reshape(queries.shape[0], *z.shape[2:]) for z in found)
    return Found(queries, key, score, cap, leaves.reshape(-1))


def systematic(key: jax.Array, pi: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(indices (count,), their weights (count,)): drawn in proportion to pi (n,) at even steps
    along its sum.

    sum_s weight_s g(index_s) has the mean sum_j g(j). Like neighbours make its spread small. O(n).
    """
    total = jnp.cumsum(pi)
    u = (
        (jnp.arange(count, dtype=pi.dtype) + jax.random.uniform(key, (), pi.dtype))
        / count
        * total[-1]
    )
    index = jnp.minimum(jnp.searchsorted(total, u, side="right"), pi.shape[0] - 1)
    return index, total[-1] / (count * jnp.maximum(pi[index], jnp.finfo(pi.dtype).tiny))


def _keys(
    key: jax.Array, order: jax.Array, size: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """(keys, weights): all of them where `count` allows, else drawn half evenly, half in proportion
    to size (Lk,).
    """
    length = size.shape[0]
    if count >= length:
        return jnp.arange(length, dtype=jnp.int32), jnp.ones_like(size)
    index, weight = systematic(key, take(size / size.sum() + 1 / length, order), count)
    return order[index], weight


def orthonormal(v: jax.Array, rounds: int) -> jax.Array:
    """The same span, columns nearly orthonormal: rounds of Cholesky, shifted so that it exists. (n,
    k), O(n k^2).
    """
    eye = jnp.eye(v.shape[1], dtype=v.dtype)
    for _ in range(rounds):
        gram = dot(v.T, v)
        size = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), jnp.finfo(v.dtype).tiny))
        root = jnp.linalg.cholesky(gram / (size[:, None] * size[None]) + RIDGE * eye)
        # a small inverse and a product: solving for every token takes several times as long
        v = dot(v, jax.scipy.linalg.solve_triangular(root, eye / size[None], lower=True).T)
    return v


def right_factor(
    key: jax.Array, e: jax.Array, keys: jax.Array, weight: jax.Array, rank: int
) -> jax.Array:
    """V (Lk, rank), nearly orthonormal, near the top right singular vectors of e (p, Lk): subspace
    iteration on e e^T.

    Rows are compared with each other on the keys drawn only. O(p Lk rank) time.
    """
    few = e[:, keys] * jnp.sqrt(weight)[None]
    gram = dot(few, few.T)
    vectors = jax.random.normal(key, (e.shape[0], rank), e.dtype)
    for _ in range(ITERATIONS):
        vectors = orthonormal(dot(gram, vectors), 2)
    return orthonormal(dot(e.T, vectors), 1)


def _left_factor(x, y, v, keys, weight, cap, shift) -> tuple[jax.Array, jax.Array]:
    """(U (Lq, rank), misfit (Lq,)): least squares of exp(min(s, cap) - shift) on the keys drawn."""
    some = v[keys]
    rank = v.shape[1]
    normal = dot(some.T * weight[None], some)
    ridge = RIDGE * jnp.trace(normal) / rank + jnp.finfo(v.dtype).eps
    normal = normal + ridge * jnp.eye(rank, dtype=v.dtype)
    solve = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(normal), True), some.T * weight[None]).T

    def body(carry, first, fresh):
        del fresh  # a row written twice is written alike
        s = dot(frames.rows(x, first, BLOCK), y[keys].T)
        e = jnp.exp(
            jnp.minimum(s, frames.rows(cap, first, BLOCK)[:, None])
            - frames.rows(shift, first, BLOCK)[:, None]
        )
        u = dot(e, solve)
        misfit = jnp.sqrt(((e - dot(u, some.T)) ** 2 * weight[None]).sum(1))
        put = jax.lax.dynamic_update_slice_in_dim
        return put(carry[0], u, first, 0), put(carry[1], misfit, first, 0)

    start = (jnp.zeros((x.shape[0], rank), v.dtype), jnp.zeros(x.shape[0], v.dtype))
    return frames.sweep(x.shape[0], BLOCK, body, start)


def _entries(found: Found, left: jax.Array, right: jax.Array, shift: jax.Array) -> Entries:
    """Exact entries, less what the low-rank part has there already."""

    def block(one):
        query, key, score = one
        low = dot(take(left, query), take(right, key).T)
        exists = (query < left.shape[0])[:, None] & (key < right.shape[0])[None]
        return jnp.where(exists, jnp.exp(score - take(shift, query)[:, None]) - low, 0)

    return Entries(
        found.query,
        found.key,
        jax.lax.map(block, (found.query, found.key, found.score), batch_size=16),
    )


def _repair(
    factor: Factor, misfit: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[Factor, jax.Array]:
    """(the same with its worst rows exact, what is left of the misfit); rows whose sum is not
    positive come first.
    """
    total = apply(factor, jnp.ones_like(y[:, :1]))[:, 0]
    bad = jnp.where(total > 0, misfit / jnp.where(total > 0, total, 1), jnp.inf)
    worst = jax.lax.top_k(bad, max(min(REPAIRED, x.shape[0] // 16), 1))[1]
    kept = drop_rows(factor, jnp.zeros(total.shape, bool).at[worst].set(True))
    return kept._replace(rows=Rows(worst, jax.nn.softmax(dot(x[worst], y.T), axis=1))), bad.at[
        worst
    ].set(0)


def factor(x: jax.Array, y: jax.Array, method: SparseLowRank) -> tuple[Factor, jax.Array]:
    """(f~ not yet normalised, the misfit (Lq,) of each row on the sampled keys, over its sum; 0
    where repaired).
    """
    lq = x.shape[0]
    lk = y.shape[0]
    rank = min(method.rank, lq, lk)
    seeds = jax.random.split(jax.random.key(method.seed), 4)
    found = search(x, y, method.entries)
    like = found.query.reshape(-1)
    cap, shift = (
        jnp.zeros(lq, x.dtype).at[like].set(z.reshape(-1), mode="drop")
        for z in (found.cap, found.score.max(-1))
    )
    picked = like[systematic(seeds[0], (like < lq).astype(x.dtype), min(SAMPLES * rank, lq))[0]]
    s = dot(x[picked], y.T)
    e = jnp.exp(jnp.minimum(s, cap[picked][:, None]) - jax.nn.logsumexp(s, axis=1, keepdims=True))
    v = right_factor(seeds[3], e, *_keys(seeds[1], found.order, (e**2).sum(0), GRAM), rank)
    keys, weight = _keys(seeds[2], found.order, (v**2).sum(1), COLUMNS * rank)
    u, misfit = _left_factor(x, y, v, keys, weight, cap, shift)
    low = Factor(u, v)
    return _repair(low._replace(entries=_entries(found, u, v, shift)), misfit, x, y)
