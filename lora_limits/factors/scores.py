"""Coordinates in which a score is a product and small: what factors of f are built from.

f = softmax(x y^T) with x (Lq, d + 1), y (Lk, d + 1), the last column of x 1 and that of y log w_j
<= 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_limits.coordinates import frame as frames
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem, project, scalars

BLOCK = 512
NOWHERE = -1e4  # the least log-weight; exp of it is 0


def coordinates(problem: LoRAProblem) -> tuple[jax.Array, jax.Array]:
    """(x, y) of a problem: (Lq, d + 1), (Lk, d + 1). Centred and balanced as in `frame`. O(L
    d_model d) time.
    """
    frame = frames.make(problem, BLOCK, centred=True)
    q = project(problem, "query", problem.x_query)
    k = project(problem, "key", problem.x_key)
    x = dot(q - frame.nu[None], frame.to_x.T)
    y = dot(k - frame.mu[None], frame.to_y.T)
    return _weighted(x, y, scalars(problem)[1] * dot(k, frame.nu[:, None]) - frame.shift)


def _weighted(x: jax.Array, y: jax.Array, log_w: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1), jnp.concatenate(
        [y, jnp.maximum(log_w, NOWHERE)], 1
    )


def of_rows(q: jax.Array, k: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x, y) of queries (n, d), whose scores are q k^T, and keys (S, d) of which `exists` (S,)
    count. O(L d^2) time.
    """
    nu = q.mean(0)
    log_w = jnp.where(exists, dot(k, nu[:, None])[:, 0], NOWHERE)
    log_w = log_w - log_w.max()
    w = jnp.where(exists, jnp.exp(log_w), 0)[:, None]
    x = q - nu[None]
    y = jnp.where(exists[:, None], k - (w * k).sum(0, keepdims=True) / jnp.maximum(w.sum(), 1), 0)
    n, n_inverse = frames.balance(dot(x.T, x), dot(y.T, w * y))
    return _weighted(dot(x, n_inverse.T), dot(y, n.T), jnp.where(exists, log_w, NOWHERE)[:, None])
