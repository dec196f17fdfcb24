"""Skeleton (CUR): a factor of f through a few of its columns and rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.checks import set_integers
from lora_limits.coordinates.frame import NOWHERE
from lora_limits.coordinates.sweep import scan
from lora_limits.factors.factor import Factor
from lora_limits.factors.method import FactorMethod
from lora_limits.linalg import dot, pseudo_inverse

QUERIES = 4  # landmark queries for each landmark key


@dataclasses.dataclass(frozen=True)
class Skeleton(FactorMethod):
    """f ~ E_:J (E_IJ)^+ E_I: with E = exp(S), `rank` keys J and four times as many queries I.

    Both by farthest-point sampling. Rows of E_I: are scaled by their sums, so that the fit counts
    every query alike. O(L k (d + k)) time, O(L k) memory. No guarantee: good on tame heads, and
    loud where it fails.
    Raises ValueError for a rank that is not an integer of at least 1.
    """

    rank: int

    def __post_init__(self):
        set_integers(self, rank=1)

    def factor(self, x: jax.Array, y: jax.Array) -> tuple[Factor, None]:
        """As FactorMethod.factor; it does not know where it errs."""
        keys = farthest_points(y[:, :-1], y[:, -1] > NOWHERE, min(self.rank, y.shape[0]))
        few = min(QUERIES * self.rank, x.shape[0])
        queries = farthest_points(x[:, :-1], x[:, -1] > 0, few)
        s = dot(x, y[keys].T)
        # rows are normalised in the end
        left = jnp.exp(s - s.max(1, keepdims=True))
        rows = jax.nn.softmax(dot(x[queries], y.T), axis=1)
        return Factor(left, dot(pseudo_inverse(rows[:, keys]), rows).T), None


def farthest_points(
    points: Float[Array, "n d"], exists: Bool[Array, " n"], count: int
) -> Int[Array, " count"]:
    """Indices, each the farthest from those before it, the first the longest. O(n d count).

    Of the points that exist, again and again if there are fewer than `count`.
    """
    square = (points**2).sum(1)
    limits = jnp.finfo(square.dtype)
    far = jnp.where(exists, float(limits.max), float(limits.min))

    def step(carry, _):
        nearest, last = carry
        from_last = square - 2 * dot(points, points[last][:, None])[:, 0] + square[last]
        nearest = jnp.minimum(nearest, from_last)
        return (nearest, jnp.argmax(nearest)), last

    start = (far, jnp.argmax(jnp.where(exists, square, -1)))
    return scan(step, start, jnp.arange(count, dtype=jnp.int32))[1]
