"""Attention to the first tokens and the last ones alone, exact: what a decoder's heads lose by it.

The first tokens because many heads of decoders put most of their weight there (Xiao et al., arXiv
2309.17453), the last ones because what is near counts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import lora_limits as ll
from lora_limits.linalg import dot
from lora_limits.method import Sampling
from lora_limits.problem import projections, pull_back, scalars


@dataclasses.dataclass(frozen=True)
class Sinks(ll.Method):
    """The gradient of a causal problem in which a query sees the first `sinks` keys and the last
    `window` up to its own.

    O(L (window + sinks) (d + d_value)) time, memory linear in L. No error is estimated.
    """

    window: int
    sinks: int = 4
    knows = frozenset({"causal", "rotations"})

    def solve(self, problem: ll.LoRAProblem, sampling: Sampling | None = None) -> ll.GradientResult:
        """The exact gradient of the narrower attention. sampling: nothing is sampled."""
        del sampling
        beta = scalars(problem)[1]
        q, k, v = projections(problem)
        out, back = jax.vjp(self.outputs, beta * q, k, v)
        residual = out - problem.target
        dq, dk, dv = back(residual)
        rows = {"query": beta * dq, "key": dk, "value": dv}
        gradient = {name: pull_back(problem, name, rows[name]) for name in problem.adapters}
        return ll.GradientResult(gradient, 0.5 * (residual**2).sum(), rank=None)

    def outputs(
        self, q: Float[Array, "l d"], k: Float[Array, "l d"], v: Float[Array, "l dv"]
    ) -> Float[Array, "l dv"]:
        """softmax over the keys that each query sees, a block of `window` queries at a time."""
        length = q.shape[0]
        size = min(self.window, length)
        blocks = -(-length // size)
        behind = blocks * size - length
        q = jnp.pad(q, ((0, behind), (0, 0))).reshape(blocks, size, -1)
        first = min(self.sinks, length)
        # A block in front: every block then finds its own keys and those of the one before it.
        around = [jnp.pad(x, ((size, behind), (0, 0))) for x in (k, v)]

        @jax.checkpoint
        def block(one):
            n, q = one
            start = n * size
            keys, values = (
                jnp.concatenate([whole[:first], jax.lax.dynamic_slice_in_dim(x, start, 2 * size)])
                for whole, x in zip((k, v), around, strict=True)
            )
            at = jnp.concatenate([jnp.arange(first), start - size + jnp.arange(2 * size)])
            own = start + jnp.arange(size)
            near = (at[None] <= own[:, None]) & (at[None] > own[:, None] - self.window)
            # Tokens of both kinds are sinks, and counted there.
            is_sink = (jnp.arange(first + 2 * size) < first)[None]
            seen = jnp.where(is_sink, at[None] <= own[:, None], near & (at >= first)[None])
            scores = jnp.where(seen, dot(q, keys.T), jnp.finfo(q.dtype).min)
            return dot(jnp.where(seen, jax.nn.softmax(scores), 0), values)

        out = jax.lax.map(block, (jnp.arange(blocks), q))
        return out.reshape(blocks * size, -1)[:length]
