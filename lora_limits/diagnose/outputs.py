"""The output of attention in blocks of queries, and problems whose output is changed on purpose.

What stands for the task is the residual, output - target: it stays what it is while scores are
scaled down or windows become one text, and the target moves with the output.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem, projections, scalars

BLOCK = 512  # queries at once, so that memory grows with the length


@functools.partial(jax.jit, static_argnames=("back", "ahead"))
def attend(
    query: Float[Array, "l d"],
    key: Float[Array, "l d"],
    value: Float[Array, "l dv"],
    scale: Any,
    back: int | None = None,
    ahead: int | None = None,
) -> Float[Array, "l dv"]:
    """softmax(scale Q K^T) V, query i seeing keys i - back to i + ahead. O(L) memory."""
    tokens = query.shape[0]
    size = min(BLOCK, tokens)
    blocks = -(-tokens // size)
    padded = jnp.pad(query, ((0, blocks * size - tokens), (0, 0)))
    keys = jnp.arange(key.shape[0])

    def rows(block: Any) -> Float[Array, "size dv"]:
        number, q = block
        distance = (number * size + jnp.arange(size))[:, None] - keys[None]
        seen = jnp.ones(distance.shape, bool)
        if back is not None:
            seen &= distance <= back
        if ahead is not None:
            seen &= distance >= -ahead
        scores = jnp.where(seen, scale * dot(q, key.T), -jnp.inf)
        # Padded queries may see no key: their rows are cut off below.
        return dot(jax.nn.softmax(scores, -1, where=seen), value)

    whole = jax.lax.map(rows, (jnp.arange(blocks), padded.reshape(blocks, size, -1)))
    return whole.reshape(blocks * size, -1)[:tokens]


@jax.jit
def output(problem: LoRAProblem) -> Float[Array, "l dv"]:
    """f V of a head, adapters in."""
    q, k, v = projections(problem)
    back = None if problem.window is None else problem.window - 1
    return attend(q, k, v, scalars(problem)[1], back, 0 if problem.causal else None)


@jax.jit
def cooled(problem: LoRAProblem, factor: Any) -> LoRAProblem:
    """The head with Q and K scaled by `factor`, that is beta by its square, and the same residual."""
    residual = output(problem) - problem.target
    other = dataclasses.replace(problem, beta=problem.beta * factor**2)
    return dataclasses.replace(other, target=output(other) - residual)


def laid_end_to_end(problems: Sequence[LoRAProblem]) -> LoRAProblem:
    """The head on its windows as one text: nothing that the model itself computes.

    Every query sees the keys of every window; the residuals are those of the windows. For problems
    without masks and positions, whose windows are not ordered.
    """
    names = ("x_query", "x_key", "x_value")
    shared: dict[tuple[int, ...], jax.Array] = {}
    rows = {}
    for name in names:
        pieces = [getattr(p, name) for p in problems]
        # Inputs that the projections share are one array in the long problem too.
        own = tuple(id(piece) for piece in pieces)
        rows[name] = shared[own] = shared[own] if own in shared else jnp.concatenate(pieces)
    residual = jnp.concatenate([output(p) - p.target for p in problems])
    long = dataclasses.replace(problems[0], **rows, target=residual)
    return dataclasses.replace(long, target=output(long) - residual)
