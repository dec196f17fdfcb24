"""A bound of a mean from draws that are bounded, by betting against every larger mean.

Let |X| <= M, x = X / M, and let e >= 0 be what somebody says the mean of x is. Who bets a share
LAMBDA of what he has, again and again, that it is less, holds after m draws

    K(e) = prod_s (1 + LAMBDA (e - x_s)),

never negative, and a martingale if the mean is e. So K(e) >= 1 / delta with probability delta at
most (Ville), and K grows with e: with probability 1 - delta the mean is below every e for which
K(e) >= 1 / delta. By Fan's inequality, ln(1 + LAMBDA y) >= LAMBDA y - KAPPA y^2 for y >= -1 with
KAPPA = -ln(1 - LAMBDA) - LAMBDA, that is so wherever

    LAMBDA (e - mean x) - KAPPA (e^2 - 2 e mean x + mean x^2) >= ln(1 / delta) / m,

a quadratic in e. With small variance it gives M ln(1 / delta) / (LAMBDA m), where the empirical
Bernstein bound of Maurer and Pontil costs five times as much. (Waudby-Smith and Ramdas, JRSS B 86,
2024, for the idea.)
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.estimate.intervals import moments
from lora_limits.estimate.rows import Terms

LAMBDA = 0.7  # near the best one for a thousand draws whose spread is a tenth of their range
KAPPA = -math.log1p(-LAMBDA) - LAMBDA


def mean_bound(
    terms: Terms,
    weights: Float[Array, " m"],
    most: Float[Array, ""],
    rounding: Float[Array, " m"],
    log_chances: float,
) -> Float[Array, "n1 n2"]:
    """>= |E X| of every entry of X_s = weights_s sum_t left_ts right_ts^T.

    Each fails with probability 2 exp(-log_chances) at most. most: >= |X| whatever is drawn; the
    bound is never above it. rounding: of the entries of each X_s. O(m n1 n2) time.
    """
    m = weights.shape[0]
    found = moments(terms, weights)
    usable = (most > 0) & jnp.isfinite(most)
    width = jnp.where(usable, most, 1)
    mean = found.unit / width * found.mean
    lost = rounding / width
    # mean x^2, its own rounding and that of the draws included
    root = jnp.sqrt((found.unit / width) ** 2 * (found.square + found.rounding))
    square = (root + jnp.sqrt((lost**2).mean())) ** 2

    def above(mean):
        """The least e for which the quadratic holds; 1, of which nothing is above, if none."""
        slope = LAMBDA + 2 * KAPPA * mean
        rest = LAMBDA * mean + KAPPA * square + log_chances / m
        inside = slope**2 - 4 * KAPPA * rest
        least = 2 * rest / (slope + jnp.sqrt(jnp.maximum(inside, 0)))
        known = (inside >= 0) & (slope > 0)
        return jnp.where(known, jnp.clip(least, 0, 1), 1)

    off = lost.mean()
    bound = width * jnp.maximum(above(mean + off), above(off - mean))
    # nothing to draw leaves nothing to bound; what is not bounded is not known
    return jnp.where(usable, bound, jnp.where(most == 0, 0, jnp.inf))
