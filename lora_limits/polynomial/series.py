"""Polynomials P of degree g for exp on the range of the scores, and envelopes of what they leave
out.

The fast gradient differentiates the factored forward, so it uses P in the normaliser and P' in the
gradient. For
Taylor P' is the series of degree g - 1; the Chebyshev and fitted series are therefore built for P'
and integrated.
An envelope is a pair (h0, h1) with |exp(s) - P(s)| <= h0 + h1 |s|^p for all |s| <= R: even in s,
and only two terms,
so that its moments can be read from features.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

SERIES = ("taylor", "chebyshev", "fitted")
CELLS = 128
NODES = 64


def taylor(degree: int, dtype) -> jax.Array:
    """Coefficients 1/n! of exp, n = 0..degree: (degree + 1,)."""
    return jnp.asarray([1.0 / math.factorial(n) for n in range(degree + 1)], dtype)


def remainder_factor(power: int, radius: jax.Array) -> jax.Array:
    """phi_p(R) = sum_n R^n / (n + p)!, so that |exp(s) - P_{p-1}(s)| <= phi_p(R) |s|^p on [-R, R]
    for Taylor's P.

    radius: any shape. The series is cut after 12 terms and a geometric tail added; exp(R) / p!
    bounds it anyway. phi_{p-1}(R) = 1/(p-1)! + R phi_p(R) gives the lower orders from the highest.
    """
    last = power + 12
    # Horner's rule from the tail inwards: 1 + R / (p + 1) (1 + R / (p + 2) (...))
    ratio = jnp.minimum(radius * (1 / (last + 1)), 0.9)
    total = 1 / (1 - ratio)
    for n in range(last, power, -1):
        total = 1 + radius * (1 / n) * total
    factorial = 1 / math.factorial(power)
    return factorial * jnp.where(ratio < 0.9, jnp.minimum(total, jnp.exp(radius)), jnp.exp(radius))


def derivative(c: jax.Array) -> jax.Array:
    """Coefficients of P' from those of P; the zero polynomial for a constant."""
    return c[1:] * np.arange(1, c.shape[0], dtype=c.dtype) if c.shape[0] > 1 else jnp.zeros_like(c)


def evaluate(c: jax.Array, s: jax.Array) -> jax.Array:
    """P(s) by Horner's rule."""
    out = jnp.zeros_like(s)
    for n in range(c.shape[0] - 1, -1, -1):
        out = out * s + c[n]
    return out


def _chebyshev_of_exp(terms: int, radius: jax.Array) -> jax.Array:
    """Chebyshev coefficients of exp on [-R, R], I_0(R), 2 I_1(R), ...: (terms,), by the discrete
    cosine transform.
    """
    theta = np.pi * (np.arange(NODES) + 0.5) / NODES
    cosines = np.cos(np.outer(np.arange(terms), theta)) * (2.0 / NODES)
    cosines[0] /= 2
    return jnp.asarray(cosines, radius.dtype) @ jnp.exp(
        radius * jnp.asarray(np.cos(theta), radius.dtype)
    )


def _to_powers(b: jax.Array, radius: jax.Array) -> jax.Array:
    """sum b_n T_n(s / R) as coefficients of powers of s."""
    n = b.shape[0]
    table = np.zeros((n, n))
    for m in range(n):
        table[m, : m + 1] = chebyshev.cheb2poly(np.eye(n)[m])[: m + 1]
    return (b @ jnp.asarray(table, b.dtype)) / radius ** np.arange(n, dtype=b.dtype)


def _integrated(c: jax.Array) -> jax.Array:
    """The antiderivative of P that vanishes at 0."""
    n = np.arange(1, c.shape[0] + 1, dtype=c.dtype)
    return jnp.concatenate([jnp.zeros_like(c[:1]), c / n])


def coefficients(
    series: str, degree: int, radius: jax.Array, sample: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Coefficients of P in powers of the score: (degree + 1,).

    series: "taylor"; "chebyshev": P' is the Chebyshev series of exp on [-R, R] cut at degree g - 1,
    and the constant of P is the one whose Chebyshev mean is right; "fitted": P' is the weighted
    least-squares fit to a sample of scores. radius: R >= every |score|; sample: (scores (m,),
    weights (m,)), used by "fitted" only.
    """
    if series == "taylor" or degree == 0:
        return taylor(degree, radius.dtype)
    b = _chebyshev_of_exp(degree, radius)
    if series == "chebyshev":
        c = _integrated(_to_powers(b, radius))
        means = np.array(
            [math.comb(n, n // 2) / 2.0**n if n % 2 == 0 else 0.0 for n in range(degree + 1)]
        )
        mean = (
            c * jnp.asarray(means, c.dtype) * radius ** np.arange(degree + 1, dtype=c.dtype)
        ).sum()
        return c.at[0].set(_chebyshev_of_exp(1, radius)[0] - mean)
    s, w = sample
    w = w / w.sum()
    t = jnp.arccos(jnp.clip(s / radius, -1, 1))
    basis = jnp.cos(np.arange(degree, dtype=s.dtype)[:, None] * t[None, :])
    # fit what the Chebyshev series leaves, with a ridge, so that a degenerate sample falls back on
    # that series
    gram = (basis * w[None]) @ basis.T
    ridge = 50 * jnp.finfo(s.dtype).eps * jnp.trace(gram) * jnp.eye(degree, dtype=s.dtype)
    b = b + jnp.linalg.solve(gram + ridge, (basis * w[None]) @ (jnp.exp(s) - b @ basis))
    c = _integrated(_to_powers(b, radius))
    return c.at[0].set((w * (jnp.exp(s) - evaluate(c, s))).sum())


def envelope(
    c: jax.Array, radius: jax.Array, power: int, mean_power: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(h0, h1) with |exp(s) - P(s)| <= h0 + h1 |s|^power for |s| <= R, for any polynomial P of
    degree below NODES.

    [0, R] is cut into CELLS; on each, for +s and -s, a Taylor expansion about the centre with every
    derivative of P bounds the error rigorously (only exp leaves a remainder). h0 covers the first
    cells, h1 the rest; the cut that minimises h0 + h1 * mean_power wins, mean_power being the mean
    of |s|^power over a sample (any value is valid).
    """
    edges = radius * jnp.asarray((np.arange(CELLS + 1) / CELLS) ** 1.5, radius.dtype)
    low = edges[:-1]
    centre = (edges[1:] + edges[:-1]) / 2
    half = (edges[1:] - edges[:-1]) / 2
    worst = jnp.zeros_like(low)
    # Horner's rule on absolute values, exp and the subtraction
    eps = (4 * c.shape[0] + 16) * jnp.finfo(radius.dtype).eps
    for sign in (1.0, -1.0):
        s = sign * centre
        p = c
        total = jnp.zeros_like(centre)
        step = jnp.ones_like(centre)
        e = jnp.exp(s)
        for m in range(c.shape[0]):
            rounding = eps * (e + evaluate(jnp.abs(p), jnp.abs(s)))
            total = total + (jnp.abs(e - evaluate(p, s)) + rounding) * step
            p = derivative(p)
            step = step * half / (m + 1)
        worst = jnp.maximum(worst, total + jnp.exp(s + half) * step)
    h0 = jax.lax.cummax(worst)
    later = np.tri(CELLS, k=-1, dtype=bool).T
    # the first cell starts at 0 and is always h0's; its lower edge is never divided by
    safe = jnp.concatenate([low[1:2], low[1:]]) ** power
    h1 = jnp.where(later, jnp.maximum(worst[None, :] - h0[:, None], 0) / safe[None, :], 0).max(1)
    cost = h0 + h1 * mean_power
    # argmin, which does not lower where double precision is switched on inside a program
    best = jnp.where(cost <= cost.min(), jnp.arange(CELLS, dtype=jnp.int32), CELLS).min()
    return h0[best], h1[best]
