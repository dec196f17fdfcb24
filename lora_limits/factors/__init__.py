"""Ways to factor f, one file each, and the one gradient that takes them all.

A method's function takes x (Lq, d + 1) and y (Lk, d + 1) with f = softmax(x y^T), as scores.py
makes them, and the method. It returns a Factor (factor.py) whose rows need not sum to 1 yet, and
for each query how large its error may be, as far as the method knows, or None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.coordinates import frame as frames
from lora_limits.estimate import relative
from lora_limits.factors import adapted, landmarks, random_features, sparse, svd
from lora_limits.factors.adapted import AdaptedMonomials
from lora_limits.factors.factor import Factor, apply, gradient, normalise, rows_of
from lora_limits.factors.landmarks import Nystrom, Skeleton
from lora_limits.factors.random_features import RandomFeatures
from lora_limits.factors.scores import coordinates
from lora_limits.factors.sparse import SparseLowRank
from lora_limits.factors.svd import Svd
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem, projections

FactorMethod = Svd | Skeleton | SparseLowRank | RandomFeatures | Nystrom | AdaptedMonomials
ROWS = 64  # queries on which an error is estimated where nobody says how many
LOST = 0.5  # an error estimated at this may as well be 1: the gradient is reported as failed

_FACTOR: dict[type, Any] = {
    Svd: svd.factor,
    Skeleton: landmarks.skeleton,
    Nystrom: landmarks.nystrom,
    RandomFeatures: random_features.factor,
    AdaptedMonomials: adapted.factor,
    SparseLowRank: sparse.factor,
}


class Outcome(NamedTuple):
    """What `run` returns; as in GradientResult."""

    loss: jax.Array
    gradient: dict[str, Any]
    rank: int
    normaliser: jax.Array
    estimate: dict[str, Any]
    relative_error: dict[str, Any]
    failed: jax.Array


def factorise(
    x: jax.Array, y: jax.Array, method: FactorMethod
) -> tuple[Factor, jax.Array | None, jax.Array]:
    """(f~ with rows that sum to 1, where to look for errors (Lq,) or None, the smallest row sum
    before, a scalar).
    """
    factor, indicator = _FACTOR[type(method)](x, y, method)
    factor, total = normalise(factor)
    return factor, indicator, total.min()


def _probabilities(problem: LoRAProblem, factor: Factor, indicator: jax.Array | None) -> jax.Array:
    """pi (Lq,): half uniform, half in proportion to |c~_i| times the indicator, or |f~_i| where
    there is none.
    """
    residual = apply(factor, projections(problem)[2]) - problem.target
    if (
        indicator is None
    ):  # a row of large entries of both signs can do no harm to the output and all to the gradient
        square = (dot(factor.left, dot(factor.right.T, factor.right)) * factor.left).sum(1)
        indicator = jnp.sqrt(jnp.maximum(square, 0))
    size = jnp.sqrt((residual**2).sum(1)) * indicator
    size = jnp.where(jnp.isfinite(size), size, 0)
    total = size.sum()
    length = size.shape[0]
    return (
        jnp.where(total > 0, size / jnp.where(total > 0, total, 1), 1 / length) + 1 / length
    ) / 2


def run(
    problem: LoRAProblem, method: FactorMethod, sampled: int | None, key: jax.Array | None
) -> Outcome:
    """The gradient by a factor of f, and its error as estimated from `sampled` rows (ROWS by
    default).
    """
    factor, indicator, smallest = factorise(*coordinates(problem), method)
    loss, grads = gradient(problem, factor)
    lk = problem.x_key.shape[0]
    frame = frames.make(problem, 512, centred=True)

    def explicit(index):
        rows = rows_of(factor, index)

        def kernel(s, w, first):
            del w
            part = jax.lax.dynamic_slice_in_dim(rows, first, min(s.shape[1], lk), 1)
            return part, part

        return kernel

    estimated, wrong = relative.from_rows(
        problem,
        frame,
        explicit,
        _probabilities(problem, factor, indicator),
        grads,
        rows=ROWS if sampled is None else sampled,
        key=jax.random.key(0) if key is None else key,
    )
    errors = jnp.stack(jax.tree.leaves(wrong))
    failed = ~((errors < LOST).all() & (smallest > 0))
    width = factor.left.shape[1] + (0 if factor.entries is None else factor.entries.key.shape[1])
    return Outcome(loss, grads, width, smallest, estimated, wrong, failed)


__all__ = [
    "AdaptedMonomials",
    "Factor",
    "FactorMethod",
    "Nystrom",
    "RandomFeatures",
    "Skeleton",
    "SparseLowRank",
    "Svd",
    "factorise",
    "run",
]
