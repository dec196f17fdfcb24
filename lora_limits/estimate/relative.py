"""The relative error of a gradient without a guarantee, estimated from rows.

E = G - G~ = sum of the rows' E_i (rows.py). A few rows, those likeliest to be wrong, are looked at
for certain, the rest by the samples X_s:

    || E ||_F^2 ~ || E_certain ||^2 + 2 <E_certain, mean X> + mean over s != t of <X_s, X_t>
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def relative_if_independent(
    terms: Terms, weights: Float[Array, " m"], approximate: Float[Array, "n1 n2"]
) -> Float[Array, ""]:
    """Estimate of || G - G~ ||_F / || G ||_F where errors of rows are mostly independent.

    Then || E ||_F^2 ~ sum_i || E_i ||_F^2, which few draws see well. What they say of the other
    products <E_i, E_j>, of mean <X_s, X_t> over s != t, counts where it is four times its own standard
    error. weights: 1 / pi, 0 for rows that are exact. inf where G~ is not finite.
    """
    m = weights.shape[0]
    left = jnp.einsum("ami,bni->abmn", terms.left, terms.left, precision=PRECISION)
    right = jnp.einsum("ami,bni->abmn", terms.right, terms.right, precision=PRECISION)
    products = (left * right).sum((0, 1))
    own = (weights * jnp.diagonal(products)).mean()
    apart = products * weights[:, None] * weights[None]
    apart = apart - jnp.diag(jnp.diagonal(apart))
    together = apart.sum() / (m * (m - 1))
    doubt = jnp.sqrt(2 * (apart**2).sum()) / (m * (m - 1))
    error = jnp.maximum(own, jnp.where(together > 4 * doubt, together, 0))
    # G~ is G and an error at right angles to it
    true = jnp.maximum((approximate**2).sum() - error, jnp.finfo(error.dtype).tiny)
    relative = jnp.sqrt(error / true)
    usable = jnp.isfinite(approximate).all() & ~jnp.isnan(relative)
    return jnp.where(usable, relative, jnp.inf)


def relative_error(
    terms: Terms,
    weights: Float[Array, " m"],
    certain: Terms,
    approximate: Float[Array, "n1 n2"],
) -> Float[Array, ""]:
    """Estimate of || G - G~ ||_F / || G ||_F, G = G~ + E; inf where G~ is not finite.

    certain: of rows whose part of E is known; terms: of rows drawn, weights 1 / pi, but 0 for those
    that are certain. The error is never put below what the certain rows make of it.
    """
    known = jnp.einsum("tmi,tmj->ij", *certain, precision=PRECISION)
    mean = jnp.einsum("tmi,tmj,m->ij", terms.left, terms.right, weights, precision=PRECISION)
    mean = mean / weights.shape[0]
    sampled = 2 * (known * mean).sum() + squared_norm(terms, weights)
    error = (known**2).sum() + jnp.maximum(sampled, 0)
    true = (approximate**2).sum() + 2 * (approximate * (known + mean)).sum() + error
    relative = jnp.sqrt(error / jnp.maximum(true, jnp.finfo(true.dtype).tiny))
    usable = jnp.isfinite(approximate).all() & ~jnp.isnan(relative)
    return jnp.where(usable, relative, jnp.inf)


def relative_of(
    samples: Float[Array, "m n1 n2"],
    known: Float[Array, "n1 n2"],
    approximate: Float[Array, "n1 n2"],
) -> Float[Array, ""]:
    """`relative_error` from X_s that are written out, 0 for rows that are certain; known: of these."""
    m = samples.shape[0]
    mean = samples.mean(0)
    # over pairs of draws
    squared = ((samples.sum(0) ** 2).sum() - (samples**2).sum()) / (m * (m - 1))
    error = (known**2).sum() + jnp.maximum(2 * (known * mean).sum() + squared, 0)
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
    weights = 1 / pi[index]
    terms = row_errors(problem, frame, kernel(index), index, block)
    certain = jax.lax.top_k(pi, min(max(rows // 4, 1), pi.shape[0]))[1]
    known = row_errors(problem, frame, kernel(certain), certain, block)
    others = jnp.where((index[:, None] == certain[None]).any(1), 0, weights)
    estimates, relative = {}, {}
    for name, each in terms.items():
        estimates[name] = Adapter(
            interval(each.a, weights, level), interval(each.b, weights, level)
        )
        relative[name] = Adapter(
            relative_error(each.a, others, known[name].a, gradient[name].a),
            relative_error(each.b, others, known[name].b, gradient[name].b),
        )
    return estimates, relative
