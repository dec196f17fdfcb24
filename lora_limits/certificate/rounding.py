"""Units of rounding: how far a computed sum or projection may be from the true one.

The model is that of Higham and Mary (SIAM J. Sci. Comput. 41, 2019): a sum of n rounded terms errs
by at most LAMBDA sqrt(n) u times the sum of absolute values, u the unit roundoff; see bound.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_limits.linalg import frobenius
from lora_limits.problem import LoRAProblem, scalars

LAMBDA = 8.0


def unit_roundoff(problem: LoRAProblem) -> float:
    """LAMBDA u: what one operation may err by, relative to its result."""
    return LAMBDA * float(jnp.finfo(problem.dtype).eps) / 2


def rounding_unit(problem: LoRAProblem, k: int, degree: int, block: int, devices: int = 1) -> float:
    """gamma = LAMBDA sqrt(n) u, n the longest chain of operations behind a moment or its evaluation.

    problem: what one of the `devices` holds. k: features.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    longest = max(problem.x_query.shape[0], problem.x_key.shape[0])
    # a moment is summed over a block, then over blocks, then over devices
    over_tokens = min(block, longest) + -(-longest // block) + (devices - 1)
    n = over_tokens + k + 4 * degree + 4 * d + 2 * dv + 32
    return n**0.5 * unit_roundoff(problem)


def projection_rounding(problem: LoRAProblem, name: str) -> jax.Array:
    """Rounding of a row of x (W* + s B A) for |x| = 1: ()."""
    weight = getattr(problem.weights, name)
    size = frobenius(weight)
    n = weight.shape[0] + 2 * weight.shape[1] + 16
    if name in problem.adapters:
        a, b = problem.adapters[name].a, problem.adapters[name].b
        size = size + jnp.abs(scalars(problem)[0]) * frobenius(a) * frobenius(b)
        n = n + a.shape[0]
    return unit_roundoff(problem) * n**0.5 * size


def inner_rounding(problem: LoRAProblem, name: str) -> jax.Array:
    """Rounding of a row of x B for |x| = 1: ()."""
    b = problem.adapters[name].b
    return unit_roundoff(problem) * b.shape[0] ** 0.5 * frobenius(b)
