"""The error of an approximate gradient, estimated from sampled query rows, with confidence
intervals.

The loss is a sum over queries, so G - G~ = sum_i E_i, and E_i is one or two outer products. For one
query, f ~ w e^s is the exact row and p = f o (c . v - rho); f~ = w P(s) / D and f' = w P'(s) / D
are the polynomial's rows, in the factor and in its kernel, c~ and rho~ follow from f~, and p~ = f~
o (c~ . v - rho~), p' = f' o (c~ . v - rho~). With tokens centred as in `frame`, E_i of dl/dW is

    query   x_i dq^T                             dq = beta sum_j (p - p')_j k_j
    key     beta (y' (Q_i - nu)^T + y nu^T)      y' = sum_j (p - p')_j x_j,  y = sum_j (p - p~)_j x_j
    value   dx c^T + x~ dc^T                     (dx, dc) = sum_j (f - f~)_j (x_j, v_j),  x~ = sum_j f~_j x_j

and dA = s (left B)^T right, dB = s left^T (right A^T). Rows i_1 .. i_m are drawn with replacement
with probabilities
pi > 0: X_s = E_{i_s} / pi_{i_s} has mean G - G~, whatever pi is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from scipy.special import stdtrit

from lora_limits.checks import check_integer
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import Frame, sweep
from lora_limits.linalg import dot
from lora_limits.polynomial import series
from lora_limits.problem import Adapter, LoRAProblem, project, scalars

# (scores (m, n), weights w (n,), first key) -> w e^s as the factor has it, and as its kernel has
# it: (m, n) each
Kernel = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Terms(NamedTuple):
    """Outer products: the share of sampled row i in a gradient array is sum_t left[t, i] right[t,
    i]^T.
    """

    left: jax.Array  # (terms, m, n1)
    right: jax.Array  # (terms, m, n2)


class Estimate(NamedTuple):
    """The estimated error G - G~ of one gradient array, at one confidence.

    error: unbiased. half_width: each entry of the true error, on its own, lies within it of
    `error`. Both of its shape. low, high: scalars, an interval for the max norm of the true error
    (Bonferroni over the entries: conservative).
    """

    error: Any
    half_width: Any
    low: Any
    high: Any


def polynomial_kernel(c: jax.Array) -> Kernel:
    """P in the factor and P' in the kernel; c: (degree + 1,) coefficients in powers of the
    score.
    """
    prime = series.derivative(c)
    return lambda s, w, first: (
        w[None] * series.evaluate(c, s),
        w[None] * series.evaluate(prime, s),
    )


class _Keys(NamedTuple):
    """One block of keys: centred tokens (n, .), and what (m, n) sampled queries give them; tokens
    seen before get 0.
    """

    xk: jax.Array
    xv: jax.Array
    k: jax.Array
    v: jax.Array
    log_e: jax.Array  # s + log w
    plain: jax.Array  # w P(s)
    prime: jax.Array  # w P'(s)


def _keys(
    problem: LoRAProblem, frame: Frame, kernel: Kernel, q: jax.Array, first, fresh, block: int
) -> _Keys:
    beta = scalars(problem)[1]
    xk = frames.rows(problem.x_key, first, block)
    xv = frames.rows(problem.x_value, first, block)
    k = project(problem, "key", xk - frame.k_shift[None])
    v = project(problem, "value", xv - frame.xv_mean[None])
    log_w = beta * dot(k, frame.nu) - (frame.shift - beta * dot(frame.mu, frame.nu))
    s = beta * dot(q, k.T)
    plain, prime = (jnp.where(fresh[None], x, 0) for x in kernel(s, jnp.exp(log_w), first))
    log_e = jnp.where(fresh[None], s + log_w[None], jnp.finfo(s.dtype).min)
    return _Keys(xk - frame.xk_mean[None], xv - frame.xv_mean[None], k, v, log_e, plain, prime)


def _normalise(problem: LoRAProblem, frame: Frame, kernel: Kernel, q: jax.Array, block: int):
    """First sweep: top = max_j s + log w (m,), [Z, sum_j w e^s v] / e^top and [D, sum_j w P v] (m,
    1 + d_value).
    """

    def body(carry, first, fresh):
        top, exact, approximate = carry
        t = _keys(problem, frame, kernel, q, first, fresh, block)
        v = jnp.concatenate([jnp.ones_like(t.v[:, :1]), t.v], 1)
        new = jnp.maximum(top, t.log_e.max(1))
        exact = exact * jnp.exp(top - new)[:, None] + dot(jnp.exp(t.log_e - new[:, None]), v)
        return new, exact, approximate + dot(t.plain, v)

    zero = jnp.zeros((q.shape[0], 1 + frame.v_mean.shape[0]), q.dtype)
    start = (jnp.full(q.shape[0], jnp.finfo(q.dtype).min, q.dtype), zero, zero)
    return sweep(problem.x_key.shape[0], block, body, start)


def _differences(
    problem: LoRAProblem, frame: Frame, kernel: Kernel, q, target, block: int
) -> tuple[jax.Array, dict]:
    """(c, sums over keys): exact minus approximate, subtracted entry by entry, both from the same
    scores.
    """
    top, *sums = _normalise(problem, frame, kernel, q, block)
    (z, mean), (d, mean_approximate) = ((x[:, :1], x[:, 1:] / x[:, :1]) for x in sums)
    c, c_approximate = (x + (frame.v_mean[None] - target) for x in (mean, mean_approximate))
    rho = (c * mean).sum(1)
    rho_approximate = (c_approximate * mean_approximate).sum(1)
    dk = problem.x_key.shape[1]
    dv = problem.x_value.shape[1]
    widths = {"query": (q.shape[1],), "key": (dk, dk), "value": (c.shape[1], dv, dv)}

    def body(carry, first, fresh):
        t = _keys(problem, frame, kernel, q, first, fresh, block)
        f = jnp.exp(t.log_e - top[:, None]) / z
        plain = t.plain / d
        prime = t.prime / d
        p = f * (dot(c, t.v.T) - rho[:, None])
        centred = dot(c_approximate, t.v.T) - rho_approximate[:, None]
        p_plain = p - plain * centred
        p_prime = p - prime * centred
        new = {
            "query": (dot(p_prime, t.k),),
            "key": (dot(p_prime, t.xk), dot(p_plain, t.xk)),
            "value": (dot(f - plain, t.v), dot(f - plain, t.xv), dot(plain, t.xv)),
        }
        return jax.tree.map(jnp.add, carry, {n: new[n] for n in carry})

    start = {
        n: tuple(jnp.zeros((q.shape[0], w), q.dtype) for w in widths[n]) for n in problem.adapters
    }
    return c, sweep(problem.x_key.shape[0], block, body, start)


def row_errors(
    problem: LoRAProblem, frame: Frame, kernel: Kernel, index: jax.Array, block: int
) -> dict[str, Adapter]:
    """The shares E_i of the queries `index` (m,) in the error of every array: {name:
    Adapter(a=Terms, b=Terms)}.

    kernel: the approximate row, a polynomial's or an explicit factor's. O(m Lk (d + d_model)) time,
    O(m (block + d_model)) memory.
    """
    (scale, beta), out = scalars(problem), {}
    xq, target = (
        jnp.take(jnp.asarray(x), index, axis=0) for x in (problem.x_query, problem.target)
    )
    q = project(problem, "query", xq - frame.q_shift[None])
    c, sums = _differences(problem, frame, kernel, q, target, block)
    for name, adapter in problem.adapters.items():
        if name == "query":
            left = xq[None]
            right = beta * sums[name][0][None]
        elif name == "key":
            left = jnp.stack(sums[name])
            right = beta * jnp.stack([q, jnp.broadcast_to(frame.nu[None], q.shape)])
        else:
            dc, dx, x = sums[name]
            left = jnp.stack([dx, x + frame.xv_mean[None]])
            right = jnp.stack([c, dc])
        out[name] = Adapter(
            a=Terms(dot(left, adapter.b), scale * right),
            b=Terms(left, scale * dot(right, adapter.a.T)),
        )
    return out


def probabilities(problem: LoRAProblem, frame: Frame, degree: int, block: int) -> jax.Array:
    """pi (Lq,): half uniform, half in proportion to |x_i|^degree |v_mean - Y_i|, x_i the centred
    balanced query.

    What a polynomial of that degree leaves of row i is of order |s|^degree |c_i|, and v_mean - Y_i
    is c_i to order 0. The uniform half keeps every E[X^2] within twice that of uniform sampling.
    O(Lq d_model (d + r)).
    """
    length = problem.x_query.shape[0]
    dtype = problem.dtype

    def body(carry, first, fresh):
        xq = frames.rows(problem.x_query, first, block)
        y = frames.rows(problem.target, first, block)
        x = dot(project(problem, "query", xq - frame.q_shift[None]), frame.to_x.T)
        new = (jnp.sqrt((z**2).sum(1)) for z in (x, frame.v_mean[None] - y))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, b, first, 0)
            for a, b in zip(carry, new, strict=True)
        )

    sizes = sweep(length, block, body, (jnp.zeros(length, dtype), jnp.zeros(length, dtype)))
    # over their largest: powers must not overflow
    x, c = (z / jnp.where(z.max() > 0, z.max(), 1) for z in sizes)
    size = x**degree * c
    # where the mean fits perfectly, every size is 0
    share = jnp.where(size.sum() > 0, size / jnp.where(size.sum() > 0, size.sum(), 1), 1 / length)
    return (share + 1 / length) / 2


def draw(key: jax.Array, pi: jax.Array, rows: int) -> jax.Array:
    """`rows` indices with probabilities pi (L,), with replacement: (rows,). O(L + rows sqrt(L)).

    First a group of sqrt(L) queries, then one of the group: a single cumulative sum of 2^20 float32
    probabilities
    would resolve each of them to a tenth only.
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


def interval(terms: Terms, weights: jax.Array, level: float) -> Estimate:
    """The mean of X_s with Student's intervals, from the terms of m sampled rows and weights 1 / pi
    (m,).

    X_s^2 is a sum of products of the factors' squares: matrix products, and no (m, n1, n2). The
    sample variance is known to rounding only, and is never taken below that: not negative, and not
    0 unless every X_s is.
    """
    m = weights.shape[0]
    count = terms.left.shape[0]
    # factors of order one, so that no square under- or overflows
    top = jnp.abs(terms.right).max((1, 2), keepdims=True)
    left = terms.left * weights[None, :, None] * top
    right = terms.right / jnp.where(top > 0, top, 1)
    unit = jnp.abs(left).max()
    left = left / jnp.where(unit > 0, unit, 1)

    def mean_product(x, y):  # over samples; of sums over terms
        return dot(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1])) / m

    mean = mean_product(left, right)
    square = mean_product(left[:, None] * left[None], right[:, None] * right[None])
    rounding = 8 * count * jnp.finfo(left.dtype).eps * mean_product(left**2, right**2)
    deviation = unit * jnp.sqrt(jnp.maximum(square - mean**2, rounding) / (m - 1))
    # Student's quantiles, of one entry and of all at once
    one, every = (-float(stdtrit(m - 1, (1 - level) / (2 * n))) for n in (1, mean.size))
    size = jnp.abs(unit * mean)
    margin = every * deviation
    return Estimate(
        unit * mean, one * deviation, jnp.maximum(size - margin, 0).max(), (size + margin).max()
    )


def check_sampling(rows: int, level: float) -> None:
    """Raises ValueError for rows that are not an integer of at least 2, and a level outside
    (0, 1).
    """
    check_integer("rows", rows, 2)
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a number between 0 and 1")


def error_estimate(
    problem: LoRAProblem,
    frame: Frame,
    c: jax.Array,
    *,
    rows: int,
    key: jax.Array,
    level: float = 0.95,
    block: int = 512,
) -> dict[str, Adapter]:
    """The error G - G~ of the polynomial gradient, from sampled rows: {name: Adapter(a=Estimate,
    b=Estimate)}.

    frame: the one the gradient was computed in; c: (degree + 1,) its coefficients in powers of the
    score. rows: how many queries are drawn, with replacement (static). level: confidence (static).
    block: keys held at once. O(rows Lk (d + d_model) + Lq d_model (d + r)) time, O(rows (block +
    d_model + sqrt(Lq)) + Lq) memory. Unbiased for any input. Student's intervals are asymptotic in
    `rows`: at 95 %, tested to hold in 90 % of draws from rows = 64 (32 if no few queries carry the
    error), max-norm ones in 93 %. Where the errors of queries cancel like random signs, intervals
    are sqrt(Lq / rows) times the error wide. Truncation only, in the dtype of the problem: rounding
    of the fast sweeps is not in it. Raises ValueError for rows that are not an integer of at least
    2, and a level outside (0, 1).
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
