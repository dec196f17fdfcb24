"""f as a few large entries a query, exact, and a low-rank rest.

What reaches heads that no low rank alone does. In the frame's coordinates s_ij = x_i . y_j + log w_j
and f = softmax(s). Four steps, no L x L object in any:

    search    a set of t keys for each block of like queries (search.py)
    cap       tau_i = the largest score found for query i outside its set. The rest is low rank
              because e_ij = exp(min(s_ij, tau_i)) is: no hole where entries are taken out, no peak
              that was missed.
    columns   V: top right singular vectors of p sampled rows of e, each over its sum of exp(s).
    rows      U_i: weighted least squares of e_ij on V_j over m sampled keys j, by their leverage.

f~_ij = (U V^T)_ij, or exp(s_ij) for j in the set of i; the worst rows, by the misfit on the sampled
keys, are computed exactly; every row is divided by its sum. Nothing is certified: what is returned
is checked by an estimate of the error from sampled rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_limits.checks import set_integers
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.factors.factor import Entries, Factor, Rows, apply, drop_rows, take
from lora_limits.factors.method import FactorMethod
from lora_limits.factors.search import Found, search
from lora_limits.linalg import dot

BLOCK = 512
SAMPLES = 4  # sampled rows, for each column of the low-rank part
COLUMNS = 4  # sampled keys, likewise
GRAM = 2048  # columns on which the sampled rows are compared with each other
REPAIRED = 128  # rows computed exactly, but no more than every sixteenth
ITERATIONS = 2  # of the subspace iteration
RIDGE = 1e-5


@dataclasses.dataclass(frozen=True)
class SparseLowRank(FactorMethod):
    """f as `entries` exact entries a query plus a factor of `rank` columns for the rest.

    BlockTree is the one to use on real heads: this one's systematic error of the forward grows as
    sqrt(L) beside the gradient. It is kept as what an explicit factor of f can do.

    O(L (rank^2 + (entries + rank) d)) time, but for a factor log L of two trees and a term L^2 d /
    256 of their leaves. No guarantee: `estimate` and `failed` say how it went. seed: of the sampled
    rows and keys. Raises ValueError for entries or rank that are not integers of at least 1.
    """

    entries: int
    rank: int
    seed: int = 0

    def __post_init__(self):
        set_integers(self, entries=1, rank=1)

    def factor(self, x: jax.Array, y: jax.Array) -> tuple[Factor, jax.Array]:
        """As FactorMethod.factor. It errs by the misfit on the sampled keys; 0 where repaired."""
        lq = x.shape[0]
        rank = min(self.rank, lq, y.shape[0])
        seeds = jax.random.split(jax.random.key(self.seed), 4)
        found = search(x, y, self.entries)
        # search
        like = found.query.reshape(-1)
        cap = _by_query(lq, like, found.cap)
        shift = _by_query(lq, like, found.score.max(-1))
        # columns: rows spread over like queries, capped, each over its sum of exp(s)
        exists = take(x[:, -1], like)
        picked = like[systematic(seeds[0], exists, min(SAMPLES * rank, lq))[0]]
        s = dot(x[picked], y.T)
        capped = jnp.minimum(s, cap[picked][:, None])
        e = jnp.exp(capped - jax.nn.logsumexp(s, axis=1, keepdims=True))
        v = right_factor(seeds[3], e, *_keys(seeds[1], found.order, (e**2).sum(0), GRAM), rank)
        # rows, on keys drawn by their leverage
        keys, weight = _keys(seeds[2], found.order, (v**2).sum(1), COLUMNS * rank)
        u, misfit = _left_factor(x, y, v, keys, weight, cap, shift)
        low = Factor(u, v, entries=_entries(found, u, v, shift))
        return _repair(low, misfit, x, y)


def _by_query(length: int, query: jax.Array, values: jax.Array) -> jax.Array:
    """(length,): values at the queries they belong to; those of padding are dropped."""
    return jnp.zeros(length, values.dtype).at[query].set(values.reshape(-1), mode="drop")


def systematic(key: jax.Array, pi: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(indices (count,), their weights (count,)), in proportion to pi (n,) at even steps of its sum.

    sum_s weight_s g(index_s) has the mean sum_j g(j). Like neighbours make its spread small. O(n).
    """
    total = jnp.cumsum(pi)
    steps = jnp.arange(count, dtype=pi.dtype) + jax.random.uniform(key, (), pi.dtype)
    u = steps / count * total[-1]
    index = jnp.minimum(jnp.searchsorted(total, u, side="right"), pi.shape[0] - 1)
    return index, total[-1] / (count * jnp.maximum(pi[index], jnp.finfo(pi.dtype).tiny))


def _keys(
    key: jax.Array, order: jax.Array, size: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """(keys, weights): all where `count` allows, else half evenly, half in proportion to size."""
    length = size.shape[0]
    if count >= length:
        return jnp.arange(length, dtype=jnp.int32), jnp.ones_like(size)
    index, weight = systematic(key, take(size / size.sum() + 1 / length, order), count)
    return order[index], weight


def orthonormal(v: jax.Array, rounds: int) -> jax.Array:
    """The same span, columns nearly orthonormal: rounds of Cholesky, shifted so that it exists.

    v: (n, k). O(n k^2).
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
    """V (Lk, rank), nearly orthonormal, near the top right singular vectors of e (p, Lk).

    By subspace iteration on e e^T. Rows are compared with each other on the keys drawn only. O(p Lk rank) time.
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
    root = jnp.linalg.cholesky(normal)
    solve = jax.scipy.linalg.cho_solve((root, True), some.T * weight[None]).T

    def body(carry, first, fresh):
        del fresh  # a row written twice is written alike
        s = dot(rows(x, first, BLOCK), y[keys].T)
        capped = jnp.minimum(s, rows(cap, first, BLOCK)[:, None])
        e = jnp.exp(capped - rows(shift, first, BLOCK)[:, None])
        u = dot(e, solve)
        misfit = jnp.sqrt(((e - dot(u, some.T)) ** 2 * weight[None]).sum(1))
        put = jax.lax.dynamic_update_slice_in_dim
        return put(carry[0], u, first, 0), put(carry[1], misfit, first, 0)

    start = (jnp.zeros((x.shape[0], rank), v.dtype), jnp.zeros(x.shape[0], v.dtype))
    return sweep(x.shape[0], BLOCK, body, start)


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
    """(the same with its worst rows exact, what is left of the misfit).

    Rows whose sum is not positive come first.
    """
    total = apply(factor, jnp.ones_like(y[:, :1]))[:, 0]
    hopeless = float(jnp.finfo(total.dtype).max)
    bad = jnp.where(total > 0, misfit / jnp.where(total > 0, total, 1), hopeless)
    bad = jnp.where(x[:, -1] > 0, bad, 0)
    worst = jax.lax.top_k(bad, max(min(REPAIRED, x.shape[0] // 16), 1))[1]
    kept = drop_rows(factor, jnp.zeros(total.shape, bool).at[worst].set(True))
    exact = Rows(worst, jax.nn.softmax(dot(x[worst], y.T), axis=1))
    return kept._replace(rows=exact), bad.at[worst].set(0)
