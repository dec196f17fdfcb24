"""Positive orthogonal random features of exp (FAVOR+), as a factor of f."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_limits.checks import set_integers
from lora_limits.factors.factor import Factor
from lora_limits.factors.method import FactorMethod
from lora_limits.linalg import dot


@dataclasses.dataclass(frozen=True)
class RandomFeatures(FactorMethod):
    """exp(x . y) = E exp(w . x - |x|^2 / 2) exp(w . y - |y|^2 / 2), w Gaussian: `rank` of them.

    Orthogonal by blocks of d. Unbiased for exp, not for f; the variance grows as exp(|x + y|^2).
    O(L k d) time, O(L k) memory. seed: of the frequencies.
    Raises ValueError for a rank that is not an integer of at least 1.
    """

    rank: int
    seed: int = 0

    def __post_init__(self):
        set_integers(self, rank=1)

    def factor(self, x: jax.Array, y: jax.Array) -> tuple[Factor, None]:
        """As FactorMethod.factor. The largest exponents are divided out: they cancel in the rows."""
        seed = jax.random.key(self.seed)
        w = orthogonal_frequencies(seed, self.rank, x.shape[1] - 1, x.dtype)

        def exponents(z):
            return dot(z, w.T) - 0.5 * (z**2).sum(1, keepdims=True)

        left = exponents(x[:, :-1])
        right = exponents(y[:, :-1]) + y[:, -1:]
        # a common factor of a row of U, or of all V, cancels in the normaliser
        return Factor(
            jnp.exp(left - left.max(1, keepdims=True)), jnp.exp(right - right.max())
        ), None


def orthogonal_frequencies(key: jax.Array, count: int, width: int, dtype=None) -> jax.Array:
    """(count, width) Gaussian rows, orthogonal within each block of `width` rows."""
    dtype = dtype or jnp.result_type(float)
    turns, sizes = jax.random.split(key)
    blocks = -(-count // width)
    q, r = jnp.linalg.qr(jax.random.normal(turns, (blocks, width, width), dtype))
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    lengths = jnp.linalg.norm(jax.random.normal(sizes, (blocks * width, width), dtype), axis=1)
    return (q.reshape(-1, width) * lengths[:, None])[:count]
