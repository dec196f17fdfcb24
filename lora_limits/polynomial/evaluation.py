"""Evaluating many polynomials of degree g, and their gradients, from the features of degree g - 1.

u_c(x) = sum_a N_ca phi_a(x) over |a| <= g. Its top part is homogeneous, so by Euler's identity

    u_c^top = (1/g) sum_i x_i W_ci,     W_ci = d u_c^top / d x_i = sum_{|b| = g-1} (b_i + 1) N_{c, b + e_i} phi_b(x),

and sum_c z_c W_ci is the gradient of any combination of the top parts. One product, (c d) x
k_{g-1}, thus serves the value and the gradient, and the features of degree g, most of all k, are
neither built nor differentiated. The lower degrees have a product each way of their own, binom(d +
g - 1, g - 1) features wide.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.linalg import dot
from lora_limits.polynomial import monomials


class Lift(NamedTuple):
    """Polynomials arranged for evaluation. low: (c, k_{g-1}); top: (c d, features of degree g - 1)
    or None at g = 0.

    slope: (s d, k_{g-2}), the derivatives of the lower parts of the first s polynomials; None below
    degree 2.
    """

    low: jax.Array
    top: jax.Array | None
    slope: jax.Array | None


class Values(NamedTuple):
    """Values at n points: the sums over degrees below g, and of degree g. low, top: (c, n); w: (c,
    d, n) or None.
    """

    low: jax.Array
    top: jax.Array | float
    w: jax.Array | None


def _raise(coefficients: jax.Array, width: int, degree: int) -> jax.Array:
    """Derivatives of polynomials of exactly degree + 1: (k_{degree+1} of that degree, c) -> (c d, k
    of degree).
    """
    index, multiplicity = monomials.raised(width, degree)
    raised = coefficients[index] * jnp.asarray(multiplicity, coefficients.dtype)[:, :, None]
    return raised.transpose(2, 0, 1).reshape(coefficients.shape[1] * width, -1)


def make(coefficients: jax.Array, slopes: int, width: int, degree: int) -> Lift:
    """Arranges c polynomials given by their coefficients (k, c), multinomials included. O(k d c).

    slopes: how many of them, from the first on, will be asked for their gradients.
    """
    below = monomials.count(width, max(degree - 1, 0))
    low = coefficients[:below].T
    if degree == 0:
        return Lift(low, None, None)
    slope = None
    if degree > 1 and slopes:
        starts = [monomials.count(width, n) for n in range(degree)]
        pairs = enumerate(itertools.pairwise(starts))
        parts = [_raise(coefficients[a:b, :slopes], width, n) for n, (a, b) in pairs]
        slope = jnp.concatenate(parts, 1)
    return Lift(low, _raise(coefficients[below:], width, degree - 1), slope)


def evaluate(lift: Lift, x: jax.Array, parts: list[jax.Array]) -> Values:
    """Values at x (d, n), parts its features by degree up to max(g - 1, 0). O(n c d k_{g-1})."""
    low = dot(lift.low, jnp.concatenate(parts))
    if lift.top is None:
        return Values(low, 0.0, None)
    d, n = x.shape
    c = lift.top.shape[0] // d
    w = dot(lift.top, parts[-1]).reshape(c, d, n)
    # summed by a product: XLA's own reductions over a broadcast are ten times slower on a CPU
    total = np.kron(np.eye(c), np.ones((1, d))) / len(parts)
    return Values(low, dot(jnp.asarray(total, x.dtype), (x[None] * w).reshape(c * d, n)), w)


def slope(
    lift: Lift, values: Values, x: jax.Array, parts: list[jax.Array], weights: jax.Array
) -> jax.Array:
    """sum_c weights_c grad u_c at x (d, n), over the first polynomials: values at x, weights (s, n)
    -> (d, n).
    """
    if values.w is None:
        return jnp.zeros_like(x)
    d, (s, n) = x.shape[0], weights.shape
    w = values.w[:s]
    if lift.slope is not None:
        w = w + dot(lift.slope, jnp.concatenate(parts[:-1])).reshape(s, d, n)
    total = np.tile(np.eye(d), (1, s))
    return dot(jnp.asarray(total, w.dtype), (w * weights[:, None]).reshape(s * d, n))
