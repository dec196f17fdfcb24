"""Draws that follow their probabilities exactly: what a promise about chances can rest on.

A cumulative sum of floating-point probabilities follows them to its rounding only. Here they are
integers over 2^48, and so is the random number; double precision holds such integers, and sums of
them, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

TOTAL = 2.0**48


class Coin(NamedTuple):
    """Probabilities in units of 1 / TOTAL: integers, in double precision, whose sum is TOTAL."""

    weights: Float[Array, " n"]

    @property
    def chances(self) -> Float[Array, " n"]:
        """The probabilities, exact."""
        return self.weights / TOTAL


def make(pi: Float[Array, " n"]) -> Coin:
    """The coin nearest to probabilities pi, every one of its own above 0. In double precision."""
    n = pi.shape[0]
    # rounded down, so that something is left over for the first, whatever pi's own rounding: 4e-9
    weights = jnp.floor(pi * (TOTAL - n - 2.0**20)) + 1
    left = TOTAL - weights.sum()
    return Coin(weights.at[0].add(left))


def draw(key: Key[Array, ""], coin: Coin, rows: int) -> Int[Array, " rows"]:
    """`rows` indices, with replacement. O(n + rows log n)."""
    high, low = jax.random.bits(key, (2, rows), jnp.uint32).astype(jnp.float64)
    # 32 bits and 16 more: an integer from 0 to TOTAL - 1, each as likely
    number = high * 2.0**16 + jnp.floor(low / 2.0**16)
    return jnp.searchsorted(jnp.cumsum(coin.weights), number, side="right").astype(jnp.int32)
