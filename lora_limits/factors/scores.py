"""Coordinates in which a score is a product and small: what factors of f are built from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_limits import frame as frames
from lora_limits.problem import LoRAProblem, dot, project, scalars

BLOCK = 512
NOWHERE = -1e4  # the least log-weight; exp of it is 0


def coordinates(problem: LoRAProblem) -> tuple[jax.Array, jax.Array]:
    """(x, y) with f = softmax(x y^T): (Lq, d + 1), (Lk, d + 1), the last column 1 and log w_j <= 0.

    Queries and keys are centred and balanced as in `frame`. O(L d_model d) time.
    """
    frame = frames.make(problem, BLOCK, centred=True)
    q, k = project(problem, "query", problem.x_query), project(problem, "key", problem.x_key)
    x, y = dot(q - frame.nu[None], frame.to_x.T), dot(k - frame.mu[None], frame.to_y.T)
    log_w = scalars(problem)[1] * dot(k, frame.nu[:, None]) - frame.shift
    return jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1), jnp.concatenate([y, jnp.maximum(log_w, NOWHERE)], 1)
