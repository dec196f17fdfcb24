"""Gradient oracles: any method of the library, compiled once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from lora_limits.gradients.methods import Exact
from lora_limits.gradients.solve import gradient
from lora_limits.method import Method
from lora_limits.problem import Adapter, LoRAProblem

DENSE_TOKENS = 2048  # up to which all L^2 scores are held at once
TILE = 1024


@partial(jax.jit, static_argnames="method")
def _compiled(problem: LoRAProblem, method: Method) -> dict[str, Adapter]:
    return gradient(problem, method).gradient


def gradient_oracle(method: Method | None = None) -> Callable[[LoRAProblem], dict[str, Adapter]]:
    """LoRAProblem -> {name: Adapter}, the gradient by `method`.

    None: exact, dense to 2048 tokens and tiled beyond, O(L^2 d) time and memory linear in L.
    """

    def oracle(problem: LoRAProblem) -> dict[str, Adapter]:
        # Dense is faster while the scores fit into memory.
        dense = problem.x_query.shape[0] <= DENSE_TOKENS
        return _compiled(problem, method or Exact(block_size=None if dense else TILE))

    return oracle
