"""Which polynomial stands for exp in a run: its coefficients, and what it leaves out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import sum_rounding
from lora_limits.certificate.row_bounds import KeyMoments, Setup
from lora_limits.coordinates import collectives
from lora_limits.coordinates.frame import row_range
from lora_limits.coordinates.sweep import sweep
from lora_limits.gradients.plan import Plan
from lora_limits.linalg import dot
from lora_limits.polynomial import series

QUERIES = 64  # about as many sampled queries, spread evenly, meet all sampled keys in a fit


def _radius(plan: Plan, moments: KeyMoments) -> Float[Array, ""]:
    """R >= every |score|: one sweep over the queries."""

    def body(radius, first, fresh):
        del fresh  # a maximum may see a token twice
        x = plan.queries(first).x
        return jnp.maximum(radius, row_range(x, moments.reach, moments.box).max())

    length = plan.problem.x_query.shape[0]
    start = jnp.zeros((), plan.problem.dtype)
    return collectives.largest(sweep(length, plan.block, body, start), plan.axis)


def setup(plan: Plan, moments: KeyMoments) -> Setup:
    """The polynomial and the envelopes of what it leaves out.

    Taylor's needs nothing but the degree; the others depend on the range of the scores, and
    "fitted" on a sample of them.
    """
    problem, g = plan.problem, plan.degree
    dtype = problem.dtype
    gamma = sum_rounding(problem, plan.features, g, plan.block, plan.parts)
    if plan.method.series == "taylor":
        return Setup(series.taylor(g, dtype), None, None, gamma)
    radius = jnp.maximum(
        _radius(plan, moments) * (1 + (32 + 4 * plan.width) * float(jnp.finfo(dtype).eps)), 0.05
    )
    x, y, w = plan.sample.x, plan.sample.y, plan.sample.w
    x = x[:, :: -(-x.shape[1] // QUERIES)]
    x, y, w = collectives.total((x, y, w), plan.axis)
    s = jnp.clip(dot(x.T, y), -radius, radius).reshape(-1)
    w = jnp.tile(w, x.shape[1]) + jnp.finfo(dtype).tiny
    c = series.coefficients(plan.method.series, g, radius, (s, w))
    # means of the powers that the envelopes are to be tight for
    mean_g = (w * jnp.abs(s) ** g).sum() / w.sum()
    mean_above = (w * jnp.abs(s) ** (g + 1)).sum() / w.sum()
    h = series.envelope(c, radius, g + 1, mean_above)
    # where P is a constant its derivative is 0, and exp itself is what is left out
    h_prime = series.envelope(series.derivative(c), radius, g, mean_g)
    return Setup(c, h, h_prime, gamma)
