"""What a frame needs to know of all keys: weighted sums, in one pass and in parts that join."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem, project, project_back, scalars


class KeyStatistics(NamedTuple):
    """Sums over keys, their weights taken over the largest among them; enough for every centre."""

    top: Float[Array, ""]  # the largest log-weight
    total: Float[Array, ""]  # sum of the weights
    xk: Float[Array, " dk"]  # weighted sum of the key inputs
    xv: Float[Array, " dx"]  # weighted sum of the value inputs

    def over(self, top: Float[Array, ""]) -> KeyStatistics:
        """The same over a larger log-weight."""
        shrink = jnp.exp(self.top - top)
        return KeyStatistics(top, self.total * shrink, self.xk * shrink, self.xv * shrink)

    def joined(self, other: KeyStatistics) -> KeyStatistics:
        """Those of both sets of keys together."""
        top = jnp.maximum(self.top, other.top)
        a, b = self.over(top), other.over(top)
        return KeyStatistics(top, a.total + b.total, a.xk + b.xk, a.xv + b.xv)


def of_problem(
    problem: LoRAProblem, q_shift: Float[Array, " dq"], block: int, axis: Axis = None
) -> KeyStatistics:
    """Over the keys of all devices, whose log-weights are beta nu . K_j; nu the query of q_shift.

    The weights are taken over the largest one seen so far, and what was summed before shrinks when
    a larger one comes.
    """
    dtype = problem.dtype
    lk, dk = problem.x_key.shape
    least = float(jnp.finfo(dtype).min)
    nu = project(problem, "query", q_shift[None])[0]
    # a log-weight is the key's input row times this
    direction = scalars(problem)[1] * project_back(problem, "key", nu[None])[0]
    start = KeyStatistics(
        jnp.asarray(least, dtype),
        jnp.zeros((), dtype),
        jnp.zeros(dk, dtype),
        jnp.zeros(problem.x_value.shape[1], dtype),
    )

    def body(carry, first, fresh):
        xk = rows(problem.x_key, first, block, problem.dtype)
        xv = rows(problem.x_value, first, block, problem.dtype)
        log_w = jnp.where(fresh, dot(xk, direction), least)
        new = jnp.maximum(carry.top, log_w.max())
        before = carry.over(new)
        w = jnp.exp(log_w - new)
        return KeyStatistics(
            new, before.total + w.sum(), before.xk + dot(w, xk), before.xv + dot(w, xv)
        )

    found = sweep(lk, block, body, start)
    if axis is None:
        return found
    new = collectives.largest(found.top, axis)
    shrunk = found.over(new)
    return KeyStatistics(new, *collectives.total(tuple(shrunk[1:]), axis))
