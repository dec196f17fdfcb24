"""Nystromformer's factor of f, through the means of segments of the sequence."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.checks import set_integers
from lora_limits.coordinates.frame import NOWHERE
from lora_limits.factors.factor import Factor
from lora_limits.factors.method import FactorMethod
from lora_limits.linalg import AnyArray, dot, pseudo_inverse


@dataclasses.dataclass(frozen=True)
class Nystrom(FactorMethod):
    """f ~ softmax(Q K_l^T) softmax(Q_l K_l^T)^+ softmax(Q_l K^T), landmarks means of `rank` segments.

    Nystromformer's, with a true pseudo-inverse. O(L k d + k^3) time, O(L k) memory. No guarantee.
    Raises ValueError for a rank that is not an integer of at least 1.
    """

    rank: int

    def __post_init__(self):
        set_integers(self, rank=1)

    def factor(self, x: jax.Array, y: jax.Array) -> tuple[Factor, None]:
        """As FactorMethod.factor; it does not know where it errs."""
        few = min(self.rank, x.shape[0], y.shape[0])
        x_few = _query_landmarks(x, few)
        y_few = _key_landmarks(y, few)
        left = jax.nn.softmax(dot(x, y_few.T), axis=1)
        middle = jax.nn.softmax(dot(x_few, y_few.T), axis=1)
        right = jax.nn.softmax(dot(x_few, y.T), axis=1)
        return Factor(left, dot(pseudo_inverse(middle), right).T), None


def _query_landmarks(x: Float[Array, "n d_and_1"], count: int) -> Float[Array, "count d_and_1"]:
    """Means of segments of the queries that are there; where none is, the centre of all of them."""
    means = segment_means(x, count)
    share = means[:, -1:]
    return jnp.where(share > 0, means / jnp.where(share > 0, share, 1), 0).at[:, -1].set(1)


def _key_landmarks(y: Float[Array, "n d_and_1"], count: int) -> Float[Array, "count d_and_1"]:
    """Means of segments of the keys that exist; a segment with none of them is nowhere."""
    exists = y[:, -1:] > NOWHERE
    counted = jnp.concatenate([jnp.where(exists, y, 0), exists.astype(y.dtype)], 1)
    means = segment_means(counted, count)
    share = means[:, -1]
    keys = means[:, :-1] / jnp.maximum(means[:, -1:], jnp.finfo(y.dtype).tiny)
    return keys.at[:, -1].set(jnp.where(share > 0, keys[:, -1], NOWHERE))


def segment_means(x: Float[AnyArray, "n d"], count: int) -> Float[Array, "count d"]:
    """Means of `count` runs of consecutive rows, their lengths equal to within one."""
    size, longer = divmod(x.shape[0], count)
    head = x[: longer * (size + 1)]
    tail = x[longer * (size + 1) :]
    parts = (
        head.reshape(longer, size + 1, x.shape[1]),
        tail.reshape(count - longer, size, x.shape[1]),
    )
    return jnp.concatenate([part.mean(1) for part in parts])
