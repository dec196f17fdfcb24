"""The error of a gradient by rows (by_rows.py), estimated from exact rows of sampled queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.estimate import masked_rows
from lora_limits.estimate.intervals import check_sampling, draw, interval_of
from lora_limits.gradients import by_rows
from lora_limits.heads import polynomial_full
from lora_limits.heads.tokens import sees_of, tokens_of
from lora_limits.linalg import dot, row_norms
from lora_limits.method import Sampling
from lora_limits.polynomial import series
from lora_limits.problem import Adapter, LoRAProblem


def kernel_of(problem: LoRAProblem, method: Any, rows: by_rows.Rows) -> masked_rows.Kernel:
    """What stands for w e^s in a row of the gradient: w P and w P', w e^s in a block of its own."""
    if by_rows.in_blocks(problem):
        c = series.taylor(method.degree, problem.dtype)
    else:
        asked = tokens_of(problem).query
        c = polynomial_full.coefficients(method, rows.x, rows.y, asked, rows.centres.w)
    prime = series.derivative(c)
    w = rows.centres.w
    block = by_rows.block_size(problem, method)
    at = jnp.arange(problem.x_key.shape[0], dtype=jnp.int32)

    def kernel(s, seen, i):
        far = w * series.evaluate(c, s), w * series.evaluate(prime, s)
        if not by_rows.in_blocks(problem):
            return far
        near = at // block == i // block
        # as in the sweep, so that no exponential overflows, nor all of them underflow
        least = float(jnp.finfo(s.dtype).min)
        top = jnp.max(s, where=near & seen, initial=least)
        top = jnp.where((seen & ~near).any(), jnp.maximum(top, 0), top)
        own = w * jnp.exp(jnp.where(near, s - top, 0))
        plain, slope = (jnp.where(near, own, z * jnp.exp(-top)) for z in far)
        return plain, slope

    return kernel


def head_of(problem: LoRAProblem, rows: by_rows.Rows) -> masked_rows.Head:
    """The rows of a gradient as the estimate of its error wants them: tokens first, not balanced."""
    x, y = rows.x.T, rows.y.T
    if rows.to_x is not None and rows.to_y is not None:
        # to_x^T to_y = 1
        x, y = dot(x, rows.to_y), dot(y, rows.to_x)
    centres = rows.centres
    asked = tokens_of(problem).query
    return masked_rows.Head(x, y, rows.v.T, centres.v_mean, centres.nu, centres.w, asked)


def chances(head: masked_rows.Head, target: jax.Array, degree: int) -> Float[Array, " lq"]:
    """pi of the queries that there are: half alike, half in proportion to |x_i|^g |v_mean - Y_i|."""
    x, c = row_norms(head.q), row_norms(head.v_mean[None] - target)
    x, c = (z / jnp.where(z.max() > 0, z.max(), 1) for z in (x, c))
    counts = head.asked.astype(x.dtype)
    size = counts * x**degree * c
    share = size / jnp.where(size.sum() > 0, size.sum(), 1)
    return (share + counts / jnp.maximum(counts.sum(), 1)) / (share.sum() + 1)


def error_estimate(
    problem: LoRAProblem, method: Any, rows: by_rows.Rows, sampling: Sampling, level: float = 0.95
) -> dict[str, Adapter]:
    """{name: Adapter(a=Estimate, b=Estimate)} from exact rows of sampled queries, masks and all."""
    check_sampling(sampling.rows, level)
    head = head_of(problem, rows)
    pi = chances(head, problem.target, method.degree)
    index = draw(sampling.key, pi, sampling.rows)
    kernel = kernel_of(problem, method, rows)
    errors = masked_rows.row_errors(problem, head, sees_of(problem), kernel, index)
    weights = jnp.where(pi[index] > 0, 1 / pi[index], 0)[:, None, None]
    return {
        n: Adapter(interval_of(weights * e.a, level), interval_of(weights * e.b, level))
        for n, e in errors.items()
    }
