"""Tokens spread evenly over the whole sequence: what scales, balances and fits are made from.

Nothing that is valid depends on them; they only make valid things tight.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis

SIZE = 256  # tokens in a sample, or all of them where there are fewer


class Sample(NamedTuple):
    """Sampled tokens, read and projected once; rows of other devices' tokens are 0.

    Queries and keys are sampled each from their own sequence, so m and n may differ.
    """

    q: Float[Array, "d m"]  # Q_i - nu
    x: Float[Array, "d m"]  # the same in the frame's coordinates
    residual: Float[Array, "m dv"]  # v_mean - Y_i, the residual c_i to order 0 in the scores
    k: Float[Array, "d n"]  # K_j - mu
    y: Float[Array, "d n"]  # the same in the frame's coordinates
    w: Float[Array, " n"]  # weights
    xk: Float[Array, "n dk"]  # key inputs, centred
    xv: Float[Array, "n dx"]  # value inputs, centred
    v: Float[Array, "dv n"]  # values, centred


def evenly(length: int, most: int = SIZE) -> Int[np.ndarray, " n"]:
    """At most `most` indices of a whole sequence, evenly spread, its first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(most, length)).astype(np.int32))


def _index(length: int, most: int, axis: Axis):
    """Indices (n,) of a sample, counted from this device's first token.

    length: tokens to a device. The sample is the same however the tokens are split.
    """
    index = evenly(length * collectives.devices(axis), most)
    return index if axis is None else index - jax.lax.axis_index(axis) * length


def sample_rows(
    x: Float[Array, "tokens width"], most: int = SIZE, axis: Axis = None
) -> Float[Array, "n width"]:
    """At most `most` rows of the whole sequence, evenly spread and static.

    Rows that other devices hold come out as some row of this one, for `own` to take out.
    """
    index = _index(x.shape[0], most, axis)
    return x[index] if axis is None else x[jnp.clip(index, 0, x.shape[0] - 1)]


def own(sampled: Float[Array, "n ..."], length: int, axis: Axis) -> Float[Array, "n ..."]:
    """`sampled`, something per sampled token, with 0 for tokens held by other devices."""
    if axis is None:
        return sampled
    index = _index(length, sampled.shape[0], axis)
    held = (index >= 0) & (index < length)
    return jnp.where(held.reshape(-1, *[1] * (sampled.ndim - 1)), sampled, 0)
