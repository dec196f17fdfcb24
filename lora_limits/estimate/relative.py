"""The relative error of a gradient without a guarantee, estimated from rows.

E = G - G~ = sum of the rows' E_i (rows.py). A few rows, those likeliest to be wrong, are looked at
for certain, the rest by the samples X_s:

    || E ||_F^2 ~ || E_certain ||^2 + 2 <E_certain, mean X> + mean over s != t of <X_s, X_t>
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates.frame import Frame
from lora_limits.estimate.intervals import check_sampling, draw, interval
from lora_limits.estimate.rows import Kernel, Terms, row_errors
from lora_limits.linalg import PRECISION, dot
from lora_limits.problem import Adapter, LoRAProblem


def squared_norm(terms: Terms, weights: Float[Array, " m"]) -> Float[Array, ""]:
    """Unbiased estimate of || G - G~ ||_F^2, possibly negative: mean of <X_s, X_t> over s != t."""
    m = weights.shape[0]
    left = terms.left * weights[None, :, None]
    products = (left[:, None] * left[None]).sum(-1)
    own = products * (terms.right[:, None] * terms.right[None]).sum(-1)
    both = dot(left.reshape(-1, left.shape[-1]).T, terms.right.reshape(-1, terms.right.shape[-1]))
    return ((both**2).sum() - own.sum()) / (m * (m - 1))


def incoherent(terms: Terms, weights: Float[Array, " m"]) -> Float[Array, ""]:
    """Estimate of sum_i || E_i ||_F^2, what || E ||_F^2 is on average where errors are independent.

    weights: 1 / pi.
    """
    left = jnp.einsum("smi,tmi->mst", terms.left, terms.left, precision=PRECISION)
    right = jnp.einsum("smi,tmi->mst", terms.right, terms.right, precision=PRECISION)
    return (weights * (left * right).sum((1, 2))).mean()


def relative_error(
    terms: Terms,
    weights: Float[Array, " m"],
    certain: Terms,
    approximate: Float[Array, "n1 n2"],
    least: Float[Array, ""] | float = 0.0,
) -> Float[Array, ""]:
    """Estimate of || G - G~ ||_F / || G ||_F, G = G~ + E; inf where G~ is not finite.

    certain: of rows whose part of E is known; terms: of rows drawn, weights 1 / pi, but 0 for those
    that are certain. The error is never put below what the certain rows make of it, and least.
    """
    known = jnp.einsum("tmi,tmj->ij", *certain, precision=PRECISION)
    mean = jnp.einsum("tmi,tmj,m->ij", terms.left, terms.right, weights, precision=PRECISION)
    mean = mean / weights.shape[0]
    sampled = 2 * (known * mean).sum() + squared_norm(terms, weights)
    error = jnp.maximum((known**2).sum() + jnp.maximum(sampled, 0), least)
    true = (approximate**2).sum() + 2 * (approximate * (known + mean)).sum() + error
    relative = jnp.sqrt(error / jnp.maximum(true, jnp.finfo(true.dtype).tiny))
    usable = jnp.isfinite(approximate).all() & ~jnp.isnan(relative)
    return jnp.where(usable, relative, jnp.inf)


def from_rows(
    problem: LoRAProblem,
    frame: Frame,
    kernel: Callable[[jax.Array], Kernel],
    pi: Float[Array, " lq"],
    gradient: dict[str, Adapter],
    *,
    rows: int,
    key: jax.Array,
    level: float = 0.95,
    block: int = 512,
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """(Estimate, relative error) of every array from rows drawn with probabilities pi.

    kernel: of the rows drawn. For the relative error the rows / 4 most probable rows are looked at
    whether drawn or not: one row can make all of an error, and an estimate of its square from pairs
    of draws needs it drawn twice. Otherwise as `error_estimate`.
    """
    check_sampling(rows, level)
    index = draw(key, pi, rows)
    terms = row_errors(problem, frame, kernel(index), index, block)
    certain = jax.lax.top_k(pi, min(max(rows // 4, 1), pi.shape[0]))[1]
    known = row_errors(problem, frame, kernel(certain), certain, block)
    others = (index[:, None] != certain[None]).all(1)
    return from_terms(terms, known, 1 / pi[index], others, gradient, level)


def from_terms(
    terms: dict[str, Adapter],
    known: dict[str, Adapter],
    weights: Float[Array, " m"],
    others: Bool[Array, " m"],
    gradient: dict[str, Adapter],
    level: float = 0.95,
    independent: bool = False,
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """(Estimate, relative error) of every array from the terms of rows drawn.

    independent: errors of rows are mostly independent, so that their squares add up; few draws see
    that better than they see the sum.

    weights: 1 / pi of each. known: terms of the rows that are certain; others: which rows drawn are
    none of these.
    """
    estimates, relative = {}, {}
    rest = jnp.where(others, weights, 0)
    for name, each in terms.items():
        estimates[name] = Adapter(
            interval(each.a, weights, level), interval(each.b, weights, level)
        )
        least = [incoherent(z, rest) if independent else 0.0 for z in (each.a, each.b)]
        relative[name] = Adapter(
            relative_error(each.a, rest, known[name].a, gradient[name].a, least[0]),
            relative_error(each.b, rest, known[name].b, gradient[name].b, least[1]),
        )
    return estimates, relative
