"""Polynomials P of degree g for exp on the range of the scores, and envelopes of what they miss.

The fast gradient differentiates the factored forward, so it uses P in the normaliser and P' in the
gradient. For Taylor P' is the series of degree g - 1; the Chebyshev and fitted series are therefore
built for P' and integrated. An envelope is a pair (h0, h1) with |exp(s) - P(s)| <= h0 + h1 |s|^p
for all |s| <= R: even in s, and only two terms, so that its moments can be read from features.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from lora_limits.linalg import dot

SERIES = ("taylor", "chebyshev", "fitted")
CELLS = 128  # that an envelope cuts [0, R] into
NODES = 64  # of the discrete cosine transform


def taylor(degree: int, dtype) -> Float[Array, " {degree}+1"]:
    """Coefficients 1/n! of exp, n = 0..degree."""
    return jnp.asarray([1.0 / math.factorial(n) for n in range(degree + 1)], dtype)


def remainder_factor(power: int, radius: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """phi_p(R) = sum_n R^n / (n + p)!: Taylor's |exp(s) - P_{p-1}(s)| <= phi_p(R) |s|^p on [-R, R].

    The series is cut after 12 terms and a geometric tail added; exp(R) / p! bounds it anyway.
    phi_{p-1}(R) = 1/(p-1)! + R phi_p(R) gives the lower orders from the highest.
    """
    last = power + 12
    # Horner's rule from the tail inwards: 1 + R / (p + 1) (1 + R / (p + 2) (...))
    ratio = jnp.minimum(radius * (1 / (last + 1)), 0.9)
    total = 1 / (1 - ratio)
    for n in range(last, power, -1):
        total = 1 + radius * (1 / n) * total
    # Where the ratio was cut the tail is no bound, and only exp(R) / p! is left.
    anyway = jnp.exp(radius)
    factor = jnp.where(ratio < 0.9, jnp.minimum(total, anyway), anyway)
    return 1 / math.factorial(power) * factor


def derivative(c: Float[Array, " n"]) -> Float[Array, " m"]:
    """Coefficients of P' from those of P; the zero polynomial for a constant."""
    if c.shape[0] == 1:
        return jnp.zeros_like(c)
    return c[1:] * np.arange(1, c.shape[0], dtype=c.dtype)


def evaluate(c: Float[Array, " n"], s: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """P(s) by Horner's rule."""
    out = jnp.zeros_like(s)
    for n in range(c.shape[0] - 1, -1, -1):
        out = out * s + c[n]
    return out


def _chebyshev_of_exp(terms: int, radius: Float[Array, ""]) -> Float[Array, " terms"]:
    """Chebyshev coefficients I_0(R), 2 I_1(R), ... of exp on [-R, R], by a cosine transform."""
    theta = np.pi * (np.arange(NODES) + 0.5) / NODES
    cosines = np.cos(np.outer(np.arange(terms), theta)) * (2.0 / NODES)
    cosines[0] /= 2
    values = jnp.exp(radius * jnp.asarray(np.cos(theta), radius.dtype))
    return dot(jnp.asarray(cosines, radius.dtype), values)


def _to_powers(b: Float[Array, " n"], radius: Float[Array, ""]) -> Float[Array, " n"]:
    """sum b_n T_n(s / R) as coefficients of powers of s."""
    n = b.shape[0]
    # Row m: the coefficients of T_m.
    table = np.zeros((n, n))
    for m in range(n):
        table[m, : m + 1] = chebyshev.cheb2poly(np.eye(n)[m])[: m + 1]
    return dot(b, jnp.asarray(table, b.dtype)) / radius ** np.arange(n, dtype=b.dtype)


def _integrated(c: Float[Array, " n"]) -> Float[Array, " n+1"]:
    """The antiderivative of P that vanishes at 0."""
    n = np.arange(1, c.shape[0] + 1, dtype=c.dtype)
    return jnp.concatenate([jnp.zeros_like(c[:1]), c / n])


def coefficients(
    series: str,
    degree: int,
    radius: Float[Array, ""],
    sample: tuple[Float[Array, " m"], Float[Array, " m"]],
) -> Float[Array, " {degree}+1"]:
    """Coefficients of P, of the degree and kind asked for, in powers of the score.

    series: "taylor"; "chebyshev": P' is the Chebyshev series of exp on [-R, R] cut at degree g - 1,
    and the constant of P is the one whose Chebyshev mean is right; "fitted": P' is the weighted
    least-squares fit to a sample of scores. radius: R >= every |score|; sample: (scores, weights),
    used by "fitted" only.
    """
    if series == "taylor" or degree == 0:
        return taylor(degree, radius.dtype)
    b = _chebyshev_of_exp(degree, radius)
    if series == "chebyshev":
        return _with_right_mean(_integrated(_to_powers(b, radius)), radius)
    return _fitted(b, radius, sample)


def _with_right_mean(c: Float[Array, " n"], radius: Float[Array, ""]) -> Float[Array, " n"]:
    """P with the constant that makes its Chebyshev mean on [-R, R] that of exp, I_0(R)."""
    orders = range(c.shape[0])
    # The Chebyshev mean of t^n on [-1, 1] is binom(n, n / 2) / 2^n, and 0 for odd n.
    means = np.array([math.comb(n, n // 2) / 2.0**n if n % 2 == 0 else 0.0 for n in orders])
    powers = radius ** np.arange(c.shape[0], dtype=c.dtype)
    mean = (c * jnp.asarray(means, c.dtype) * powers).sum()
    return c.at[0].set(_chebyshev_of_exp(1, radius)[0] - mean)


def _fitted(
    b: Float[Array, " degree"],
    radius: Float[Array, ""],
    sample: tuple[Float[Array, " m"], Float[Array, " m"]],
) -> Float[Array, " degree+1"]:
    """P whose P' is fitted to exp on a weighted sample; b: the Chebyshev series of exp."""
    degree = b.shape[0]
    s, w = sample
    w = w / w.sum()
    # T_n(s / R) = cos(n arccos(s / R))
    t = jnp.arccos(jnp.clip(s / radius, -1, 1))
    basis = jnp.cos(np.arange(degree, dtype=s.dtype)[:, None] * t[None, :])
    weighted = basis * w[None]
    # What the Chebyshev series leaves is fitted, with a ridge, so that a degenerate sample falls
    # back on that series.
    gram = dot(weighted, basis.T)
    ridge = 50 * jnp.finfo(s.dtype).eps * jnp.trace(gram) * jnp.eye(degree, dtype=s.dtype)
    left = jnp.exp(s) - dot(b, basis)
    b = b + jnp.linalg.solve(gram + ridge, dot(weighted, left))
    c = _integrated(_to_powers(b, radius))
    # The constant makes the weighted mean of the error 0.
    return c.at[0].set((w * (jnp.exp(s) - evaluate(c, s))).sum())


def envelope(
    c: Float[Array, " n"], radius: Float[Array, ""], power: int, mean_power: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(h0, h1) with |exp(s) - P(s)| <= h0 + h1 |s|^power for |s| <= R, any P of degree below NODES.

    [0, R] is cut into CELLS; on each, for +s and -s, a Taylor expansion about the centre with every
    derivative of P bounds the error rigorously (only exp leaves a remainder). h0 covers the first
    cells, h1 the rest; the cut that minimises h0 + h1 * mean_power wins, mean_power being the mean
    of |s|^power over a sample (any value is valid).
    """
    # Cells are narrower near 0, where the scores are.
    edges = radius * jnp.asarray((np.arange(CELLS + 1) / CELLS) ** 1.5, radius.dtype)
    low = edges[:-1]
    centre = (edges[1:] + edges[:-1]) / 2
    half = (edges[1:] - edges[:-1]) / 2
    positive = _worst_in_cells(c, centre, half)
    negative = _worst_in_cells(c, -centre, half)
    worst = jnp.maximum(positive, negative)

    # Cut after cell i: h0 is the worst of the cells up to it, h1 of those behind, less h0.
    h0 = jax.lax.cummax(worst)
    later = np.tri(CELLS, k=-1, dtype=bool).T
    # The first cell starts at 0 and is always h0's; its lower edge is never divided by.
    safe = jnp.concatenate([low[1:2], low[1:]]) ** power
    excess = jnp.maximum(worst[None, :] - h0[:, None], 0)
    h1 = jnp.where(later, excess / safe[None, :], 0).max(1)
    cost = h0 + h1 * mean_power
    # Not argmin: it does not lower where double precision is switched on inside a program.
    best = jnp.where(cost <= cost.min(), jnp.arange(CELLS, dtype=jnp.int32), CELLS).min()
    return h0[best], h1[best]


def _worst_in_cells(
    c: Float[Array, " n"], s: Float[Array, " cells"], half: Float[Array, " cells"]
) -> Float[Array, " cells"]:
    """A bound of |exp - P| within `half` of each s, rounding included."""
    # Horner's rule on absolute values, exp and the subtraction.
    eps = (4 * c.shape[0] + 16) * jnp.finfo(s.dtype).eps
    e = jnp.exp(s)
    p = c
    total = jnp.zeros_like(s)
    # half^m / m!
    step = jnp.ones_like(s)
    for m in range(c.shape[0]):
        rounding = eps * (e + evaluate(jnp.abs(p), jnp.abs(s)))
        error = jnp.abs(e - evaluate(p, s)) + rounding
        total = total + error * step
        p = derivative(p)
        step = step * half / (m + 1)
    # All derivatives of P are used up: the remainder is that of exp.
    return total + jnp.exp(s + half) * step
