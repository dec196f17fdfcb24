"""Taylor's monomials in the coordinates where they matter, the largest first: a polynomial factor
of any width.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lora_limits.checks import set_integers
from lora_limits.factors.factor import Factor
from lora_limits.factors.method import FactorMethod
from lora_limits.linalg import dot


@dataclasses.dataclass(frozen=True)
class AdaptedMonomials(FactorMethod):
    """exp(s) ~ the `rank` largest terms x^a y^a / a! of Taylor's series: each direction gets the
    degree it deserves.

    Coordinates are balanced and turned to the axes of their common second moment, diag(l); a term
    counts as l^a / a!. O(L k degree) time beside k d degree for the choice, O(L k) memory. No
    guarantee but Taylor's own when every term of a degree is in. degree: the highest considered.
    Raises ValueError for a rank or degree that is not an integer of at least 1.
    """

    rank: int
    degree: int = 8

    def __post_init__(self):
        set_integers(self, rank=1, degree=1)

    def factor(self, x: jax.Array, y: jax.Array) -> tuple[Factor, None]:
        """As FactorMethod.factor; it does not know where it errs."""
        w = jnp.exp(y[:, -1:])
        on_queries = dot(x[:, :-1].T, x[:, :-1]) / jnp.maximum(x[:, -1].sum(), 1)
        on_keys = dot(y[:, :-1].T, w * y[:, :-1]) / w.sum()
        size, axes = jnp.linalg.eigh((on_queries + on_keys) / 2)
        # the longest axis first
        size = size[::-1]
        axes = axes[:, ::-1]
        d = size.shape[0]
        terms = min(self.rank, math.comb(d + self.degree, d))
        index, value = largest_terms(size, terms, self.degree)
        # multinomial coefficient over g!: 1 / a!, half of its root to each side
        log_l = jnp.append(jnp.log(jnp.maximum(size, jnp.finfo(size.dtype).tiny)), 0)
        half = jnp.exp((value - log_l[index].sum(1)) / 2)

        def features(z):
            z = jnp.concatenate([dot(z, axes), jnp.ones_like(z[:, :1])], 1).T
            out = jnp.ones((index.shape[0], z.shape[1]), z.dtype)
            for g in range(index.shape[1]):
                out = out * z[index[:, g]]
            return (out * half[:, None]).T

        return Factor(features(x[:, :-1]), features(y[:, :-1]) * w), None


def largest_terms(size: jax.Array, rank: int, degree: int) -> tuple[jax.Array, jax.Array]:
    """(index (rank, degree), log of l^a / a! (rank,)) of the largest terms in l = size (d,).

    Largest first. A term is a list of directions, non-decreasing, then d for "no more". Terms of degree g come
    from the `rank` largest of degree g - 1: none is missed, as leaving out its smallest direction
    makes a term no smaller while l_i <= a_i.
    """
    d = size.shape[0]
    least = float(jnp.finfo(size.dtype).min)
    log_l = jnp.log(jnp.maximum(size, jnp.finfo(size.dtype).tiny))
    index = jnp.full((1, degree), d, jnp.int32)
    value = jnp.zeros(1, size.dtype)
    last = jnp.zeros(1, jnp.int32)
    run = jnp.zeros(1, jnp.int32)
    found = [(index, value)]
    for g in range(degree):
        along = jnp.arange(d, dtype=jnp.int32)
        times = jnp.where(along[None] == last[:, None], run[:, None], 0) + 1
        grown = value[:, None] + log_l[None] - jnp.log(times.astype(size.dtype))
        grown = jnp.where(along[None] >= last[:, None], grown, least).reshape(-1)
        value, chosen = jax.lax.top_k(grown, min(rank, grown.shape[0]))
        parent = chosen // d
        last = chosen % d
        index = index[parent].at[:, g].set(last)
        run = times.reshape(-1)[chosen]
        found.append((index, value))
    index, value = (jnp.concatenate(z) for z in zip(*found, strict=True))
    value, chosen = jax.lax.top_k(value, min(rank, value.shape[0]))
    return index[chosen], value
