"""The error of an approximate gradient, estimated from sampled query rows, with intervals.

Rows i_1 .. i_m are drawn with replacement with probabilities pi > 0: X_s = E_{i_s} / pi_{i_s}
(rows.py) has the mean G - G~, whatever pi is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from scipy.special import stdtrit

from lora_limits.checks import check_integer, fail
from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.sweep import rows as block_rows
from lora_limits.coordinates.sweep import sweep
from lora_limits.estimate.rows import Terms, polynomial_kernel, row_errors
from lora_limits.linalg import dot, row_norms
from lora_limits.problem import Adapter, LoRAProblem


class Estimate(NamedTuple):
    """The estimated error G - G~ of one gradient array, at one confidence.

    error: unbiased. half_width: each entry of the true error, on its own, lies within it of
    `error`. Both of its shape.
    low, high: scalars, an interval for the max norm of the true error (Bonferroni over the entries:
    conservative).
    """

    error: Any
    half_width: Any
    low: Any
    high: Any


def probabilities(
    problem: LoRAProblem, frame: Frame, degree: int, block: int
) -> Float[Array, " lq"]:
    """pi: half uniform, half in proportion to |x_i|^degree |v_mean - Y_i|, x_i balanced.

    What a polynomial of that degree leaves of row i is of order |s|^degree |c_i|, and v_mean - Y_i
    is c_i to order 0. The uniform half keeps every E[X^2] within twice that of uniform sampling.
    O(Lq d_model (d + r)).
    """
    length, dtype = problem.x_query.shape[0], problem.dtype

    def body(carry, first, fresh):
        del fresh  # a size written twice is written alike
        xq = block_rows(problem.x_query, first, block, problem.dtype)
        y = block_rows(problem.target, first, block, problem.dtype)
        x = frame.x(frame.centred_queries(problem, xq))
        new = row_norms(x), row_norms(frame.v_mean[None] - y)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, b, first, 0)
            for a, b in zip(carry, new, strict=True)
        )

    sizes = sweep(length, block, body, (jnp.zeros(length, dtype), jnp.zeros(length, dtype)))
    # over their largest: powers must not overflow
    x, c = (z / jnp.where(z.max() > 0, z.max(), 1) for z in sizes)
    return half_uniform(x**degree * c)


def half_uniform(size: Float[Array, " n"]) -> Float[Array, " n"]:
    """Probabilities, half uniform and half in proportion to size >= 0; uniform if all are 0."""
    total = size.sum()
    uniform = 1 / size.shape[0]
    share = jnp.where(total > 0, size / jnp.where(total > 0, total, 1), uniform)
    return (share + uniform) / 2


def draw(key: Key[Array, ""], pi: Float[Array, " n"], rows: int) -> Int[Array, " rows"]:
    """`rows` indices with probabilities pi, with replacement. O(n + rows sqrt(n)).

    First a group of sqrt(n) queries, then one of the group: a single cumulative sum of 2^20 float32
    probabilities would resolve each of them to a tenth only.
    """
    length = pi.shape[0]
    n = math.isqrt(length - 1) + 1
    table = jnp.pad(pi, (0, n * n - length)).reshape(n, n)
    u = jax.random.uniform(key, (2, rows), pi.dtype)

    def invert(weights, u):
        total = jnp.cumsum(weights, axis=1)
        return (total <= u[:, None] * total[:, -1:]).sum(1, dtype=jnp.int32)

    group = jnp.minimum(invert(table.sum(1)[None], u[0]), n - 1)
    return jnp.minimum(group * n + invert(table[group], u[1]), length - 1)


class Moments(NamedTuple):
    """Means over m sampled rows of X_s and of X_s^2, entry by entry, in units of `unit`."""

    unit: Float[Array, ""]
    mean: Float[Array, "n1 n2"]
    square: Float[Array, "n1 n2"]
    rounding: Float[Array, "n1 n2"]  # of `square`


def moments(terms: Terms, weights: Float[Array, " m"]) -> Moments:
    """From the terms of m sampled rows, weights 1 / pi.

    X_s^2 is a sum of products of the factors' squares: matrix products, and no (m, n1, n2).
    """
    m = weights.shape[0]
    count = terms.left.shape[0]
    # factors of order one, so that no square under- or overflows
    top = jnp.abs(terms.right).max((1, 2), keepdims=True)
    left = terms.left * weights[None, :, None] * top
    right = terms.right / jnp.where(top > 0, top, 1)
    unit = jnp.abs(left).max()
    left = left / jnp.where(unit > 0, unit, 1)

    def mean_product(x, y):
        """Over samples; of sums over terms."""
        return dot(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1])) / m

    square = mean_product(left[:, None] * left[None], right[:, None] * right[None])
    rounding = 8 * count * jnp.finfo(left.dtype).eps * mean_product(left**2, right**2)
    return Moments(unit, mean_product(left, right), square, rounding)


def interval(terms: Terms, weights: Float[Array, " m"], level: float) -> Estimate:
    """The mean of X_s with Student's intervals, from the terms of m sampled rows, weights 1 / pi.

    The sample variance is known to rounding only, and is never taken below that: not negative, and
    not 0 unless every X_s is.
    """
    m = weights.shape[0]
    unit, mean, square, rounding = moments(terms, weights)
    deviation = unit * jnp.sqrt(jnp.maximum(square - mean**2, rounding) / (m - 1))
    # Student's quantiles, of one entry and of all at once
    one, every = (-float(stdtrit(m - 1, (1 - level) / (2 * n))) for n in (1, mean.size))
    size = jnp.abs(unit * mean)
    margin = every * deviation
    low = jnp.maximum(size - margin, 0).max()
    return Estimate(unit * mean, one * deviation, low, (size + margin).max())


def interval_of(samples: Float[Array, "m n1 n2"], level: float) -> Estimate:
    """`interval` of X_s that are written out."""
    m = samples.shape[0]
    mean = samples.mean(0)
    square = (samples**2).mean(0)
    rounding = 8 * float(jnp.finfo(samples.dtype).eps) * square
    spread = jnp.maximum(((samples - mean[None]) ** 2).mean(0), rounding)
    deviation = jnp.sqrt(spread / (m - 1))
    one, every = (-float(stdtrit(m - 1, (1 - level) / (2 * n))) for n in (1, mean.size))
    margin = every * deviation
    low = jnp.maximum(jnp.abs(mean) - margin, 0).max()
    return Estimate(mean, one * deviation, low, (jnp.abs(mean) + margin).max())


def check_sampling(rows: int, level: float) -> None:
    """Raises ValueError for rows below 2 or not an integer, and for a level outside (0, 1)."""
    check_integer("rows", rows, 2)
    if not 0 < level < 1:
        fail("level", repr(level), "a number between 0 and 1")


def error_estimate(
    problem: LoRAProblem,
    frame: Frame,
    c: Float[Array, " degree_and_1"],
    *,
    rows: int,
    key: jax.Array,
    level: float = 0.95,
    block: int = 512,
) -> dict[str, Adapter]:
    """The error G - G~ of the polynomial gradient: {name: Adapter(a=Estimate, b=Estimate)}.

    frame: the one the gradient was computed in; c: its coefficients in powers of the score. rows:
    how many queries are drawn, with replacement (static). level: confidence (static). block: keys
    held at once.
    O(rows Lk (d + d_model) + Lq d_model (d + r)) time, O(rows (block + d_model + sqrt(Lq)) + Lq)
    memory.
    Unbiased for any input. Student's intervals are asymptotic in `rows`: at 95 %, tested to hold in
    90 % of draws from rows = 64 (32 if no few queries carry the error), max-norm ones in 93 %.
    Where the errors of queries cancel like random signs, intervals are sqrt(Lq / rows) times the
    error wide. Truncation only, in the dtype of the problem: rounding of the fast sweeps is not in
    it.
    Raises ValueError for rows that are not an integer of at least 2, and a level outside (0, 1).
    """
    check_sampling(rows, level)
    pi = probabilities(problem, frame, c.shape[0] - 1, block)
    index = draw(key, pi, rows)
    terms = row_errors(problem, frame, polynomial_kernel(c), index, block)
    weights = 1 / pi[index]
    return {
        n: Adapter(interval(t.a, weights, level), interval(t.b, weights, level))
        for n, t in terms.items()
    }
