"""Which queries are looked at, where all would be too many: drawn at random, or one of every kind."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import lora_limits as ll
from lora_limits.coordinates.frame import Frame
from lora_limits.linalg import AnyArray, row_norms, widened

# Of |q_i|, in the mixture that queries are drawn from: the variance of an estimate is at most
# len(POWERS) times that of drawing by the power that is right for it.
POWERS = (0, 2, 6, 12)


class Draw(NamedTuple):
    """Which queries are looked at, and what each counts for in a sum over all of them."""

    which: Int[AnyArray, " m"]
    weights: Float[AnyArray, " m"]


def distinct(problem: ll.LoRAProblem) -> Draw:
    """One of every kind of query, with as many as there are of it. O(L log L)."""
    rows = np.concatenate([np.asarray(problem.x_query), np.asarray(problem.target)], 1)
    _, index, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    return Draw(index.astype(np.int32), counts.astype(rows.dtype))


def mixture(problem: ll.LoRAProblem, frame: Frame) -> Float[Array, " lq"]:
    """pi: the mean over POWERS p of |q_i|^p / sum |q|^p, q_i the balanced centred queries."""
    x = widened(jnp.asarray(problem.x_query), problem.dtype)
    q = row_norms(frame.x(frame.centred_queries(problem, x)))
    size = q / jnp.where(q.max() > 0, q.max(), 1)
    parts = [jnp.where(q.max() > 0, size, 1) ** p for p in POWERS]
    return jnp.stack([x / x.sum() for x in parts]).mean(0)
