"""Factors of f from landmarks, a few of the keys and queries: Skeleton (CUR) and Nystrom (means of
segments).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.checks import check_integer
from lora_limits.factors.factor import Factor
from lora_limits.factors.scores import NOWHERE
from lora_limits.linalg import dot

QUERIES = 4  # landmark queries for each landmark key


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """f ~ E_:J (E_IJ)^+ E_I: with E = exp(S), `rank` keys J and four times as many queries I.

    Both by farthest-point sampling. Rows of E_I: are scaled by their sums, so that the fit counts
    every query alike. O(L k (d + k)) time, O(L k) memory. No guarantee: good on tame heads, and
    loud where it fails. Raises ValueError for a rank that is not an integer of at least 1.
    """

    rank: int

    def __post_init__(self):
        check_integer("Skeleton rank", self.rank, 1)


@dataclasses.dataclass(frozen=True)
class Nystrom:
    """f ~ softmax(Q K_l^T) softmax(Q_l K_l^T)^+ softmax(Q_l K^T), landmarks the means of `rank`
    segments.

    Nystromformer's, with a true pseudo-inverse. O(L k d + k^3) time, O(L k) memory. No guarantee.
    Raises ValueError for a rank that is not an integer of at least 1.
    """

    rank: int

    def __post_init__(self):
        check_integer("Nystrom rank", self.rank, 1)


def farthest_points(points: jax.Array, count: int) -> jax.Array:
    """Indices (count,) of points (n, d), each the farthest from those before, the first the
    longest. O(n d count).
    """
    square = (points**2).sum(1)

    def step(carry, _):
        nearest, last = carry
        nearest = jnp.minimum(
            nearest, square - 2 * dot(points, points[last][:, None])[:, 0] + square[last]
        )
        return (nearest, jnp.argmax(nearest)), last

    start = (jnp.full_like(square, jnp.inf), jnp.argmax(square))
    return jax.lax.scan(step, start, length=count)[1]


def pseudo_inverse(a: jax.Array) -> jax.Array:
    """A^+ (n, m) of a (m, n), singular values below the square root of the rounding unit
    dropped.
    """
    return jnp.linalg.pinv(a, rtol=float(np.sqrt(jnp.finfo(a.dtype).eps)))


def skeleton(x: jax.Array, y: jax.Array, method: Skeleton) -> tuple[Factor, None]:
    """(f~ not yet normalised, no indicator of errors)."""
    keys = farthest_points(y[:, :-1], min(method.rank, y.shape[0]))
    queries = farthest_points(x[:, :-1], min(QUERIES * method.rank, x.shape[0]))
    s = dot(x, y[keys].T)
    left = jnp.exp(s - s.max(1, keepdims=True))  # rows are normalised in the end
    rows = jax.nn.softmax(dot(x[queries], y.T), axis=1)
    return Factor(left, dot(pseudo_inverse(rows[:, keys]), rows).T), None


def segment_means(x: jax.Array, count: int) -> jax.Array:
    """Means of `count` runs of consecutive rows, their lengths equal to within one. (L, d) ->
    (count, d).
    """
    size, longer = divmod(x.shape[0], count)
    head = x[: longer * (size + 1)]
    tail = x[longer * (size + 1) :]
    parts = (
        head.reshape(longer, size + 1, x.shape[1]),
        tail.reshape(count - longer, size, x.shape[1]),
    )
    return jnp.concatenate([part.mean(1) for part in parts])


def nystrom(x: jax.Array, y: jax.Array, method: Nystrom) -> tuple[Factor, None]:
    """(f~ not yet normalised, no indicator of errors)."""
    few = min(method.rank, x.shape[0], y.shape[0])
    exists = y[:, -1:] > NOWHERE  # a masked key takes no part in the mean of its segment
    keys = segment_means(jnp.concatenate([jnp.where(exists, y, 0), exists.astype(y.dtype)], 1), few)
    keys, share = keys[:, :-1] / jnp.maximum(keys[:, -1:], jnp.finfo(y.dtype).tiny), keys[:, -1]
    queries = segment_means(x, few)
    keys = keys.at[:, -1].set(jnp.where(share > 0, keys[:, -1], NOWHERE))
    left, middle, right = (
        jax.nn.softmax(dot(a, b.T), axis=1) for a, b in ((x, keys), (queries, keys), (queries, y))
    )
    return Factor(left, dot(pseudo_inverse(middle), right).T), None
