"""The limit of every factor of one width: the singular value decomposition of f itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_limits.checks import set_integers
from lora_limits.factors.factor import Factor
from lora_limits.factors.method import FactorMethod
from lora_limits.linalg import dot


@dataclasses.dataclass(frozen=True)
class Svd(FactorMethod):
    """The best rank-k f~ in Frobenius norm (Eckart and Young), dense: to be compared with, never to
    be fast.

    O(L^3) time, O(L^2) memory. Raises ValueError for a rank that is not an integer of at least 1.
    """

    rank: int

    def __post_init__(self):
        set_integers(self, rank=1)

    def factor(self, x: jax.Array, y: jax.Array) -> tuple[Factor, None]:
        """As FactorMethod.factor, with rows that do not quite sum to 1."""
        f = jax.nn.softmax(dot(x, y.T), axis=1) * x[:, -1:]
        u, s, vt = jnp.linalg.svd(f, full_matrices=False)
        rank = min(self.rank, s.shape[0])
        return Factor(u[:, :rank] * s[None, :rank], vt[:rank].T), None
