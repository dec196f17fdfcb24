"""Evaluating many polynomials of degree g, and their gradients, from the features of degree g - 1.

u_c(x) = sum_a N_ca phi_a(x) over |a| <= g. Its top part is homogeneous, so by Euler's identity

    u_c^top = (1/g) sum_i x_i W_ci
    W_ci    = d u_c^top / d x_i = sum_{|b| = g-1} (b_i + 1) N_{c, b + e_i} phi_b(x),

and sum_c z_c W_ci is the gradient of any combination of the top parts. One product, (c d) x
k_{g-1}, thus serves the value and the gradient, and the features of degree g, most of all k, are
neither built nor differentiated. The lower degrees have a product each way of their own,
binom(d + g - 1, g - 1) features wide.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_limits.linalg import dot
from lora_limits.polynomial import monomials


class Lift(NamedTuple):
    """c polynomials arranged for evaluation, gradients of the first s of them included."""

    low: Float[Array, "c k_below_g"]  # coefficients of the degrees below g
    top: Float[Array, "c_d k_of_g_less_1"] | None  # derivatives of the degree g; None at g = 0
    slope: Float[Array, "s_d k_below_g_less_1"] | None  # of the degrees below; None where g < 2


class Values(NamedTuple):
    """Values at n points: the sums over degrees below g, and of degree g; and the W above."""

    low: Float[Array, "c n"]
    top: Float[Array, "c n"] | float  # 0.0 at g = 0
    w: Float[Array, "c d n"] | None  # None at g = 0


def _raise(
    coefficients: Float[Array, "k_above c"], width: int, degree: int
) -> Float[Array, "c_d k"]:
    """Derivatives of polynomials of exactly degree + 1, as coefficients of exactly `degree`."""
    index, multiplicity = monomials.raised(width, degree)
    multiplicity = jnp.asarray(multiplicity, coefficients.dtype)
    # (d, k, c) to (c, d, k)
    derivatives = (coefficients[index] * multiplicity[:, :, None]).transpose(2, 0, 1)
    return derivatives.reshape(coefficients.shape[1] * width, -1)


def make(coefficients: Float[Array, "k c"], slopes: int, width: int, degree: int) -> Lift:
    """Arranges polynomials given by their coefficients, multinomials included. O(k d c).

    slopes: how many of them, from the first on, will be asked for their gradients.
    """
    below = monomials.count(width, max(degree - 1, 0))
    low = coefficients[:below].T
    if degree == 0:
        return Lift(low, None, None)
    slope = None
    if degree > 1 and slopes:
        # degree by degree, 1 to g - 1
        starts = [monomials.count(width, n) for n in range(degree)]
        pairs = enumerate(itertools.pairwise(starts))
        parts = [_raise(coefficients[a:b, :slopes], width, n) for n, (a, b) in pairs]
        slope = jnp.concatenate(parts, 1)
    return Lift(low, _raise(coefficients[below:], width, degree - 1), slope)


def evaluate(lift: Lift, x: Float[Array, "d n"], parts: list[Float[Array, "_ n"]]) -> Values:
    """Values at x, parts its features by degree up to max(g - 1, 0). O(n c d k_{g-1})."""
    low = dot(lift.low, jnp.concatenate(parts))
    if lift.top is None:
        return Values(low, 0.0, None)
    d, n = x.shape
    c = lift.top.shape[0] // d
    degree = len(parts)
    w = dot(lift.top, parts[-1]).reshape(c, d, n)
    # Summed over d by a product: XLA's reductions over a broadcast are ten times slower on a CPU.
    total = np.kron(np.eye(c), np.ones((1, d))) / degree
    products = (x[None] * w).reshape(c * d, n)
    return Values(low, dot(jnp.asarray(total, x.dtype), products), w)


def slope(
    lift: Lift,
    values: Values,
    x: Float[Array, "d n"],
    parts: list[Float[Array, "_ n"]],
    weights: Float[Array, "s n"],
) -> Float[Array, "d n"]:
    """sum_c weights_c grad u_c at x over the first s polynomials; values, parts: as at x."""
    if values.w is None:
        return jnp.zeros_like(x)
    d = x.shape[0]
    s, n = weights.shape
    w = values.w[:s]
    if lift.slope is not None:
        w = w + dot(lift.slope, jnp.concatenate(parts[:-1])).reshape(s, d, n)
    # Summed over s by a product, as above.
    total = np.tile(np.eye(d), (1, s))
    products = (w * weights[:, None]).reshape(s * d, n)
    return dot(jnp.asarray(total, w.dtype), products)
