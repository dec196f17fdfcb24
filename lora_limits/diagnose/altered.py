"""Heads that the model does not have, for what would be: scores scaled down, windows as one text.

Both keep the noise in the target, which stands for the task: the target is the frozen head's output
plus noise, and the frozen head changes with the scores and with the keys there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.gradients.exact import dense_terms
from lora_limits.problem import LoRAProblem


def _frozen(problem: LoRAProblem) -> LoRAProblem:
    """The head with adapters that add nothing.

    Never inside a jit: of zeros that are constants of a program XLA's CPU compiler (jax 0.10.2)
    makes NaN, where dense attention of 4096 tokens or more is in it too.
    """
    return dataclasses.replace(problem, adapters=jax.tree.map(jnp.zeros_like, problem.adapters))


def cooled(problem: LoRAProblem, factor: jax.Array) -> LoRAProblem:
    """The head with Q and K scaled by `factor`, that is beta by its square, and the same noise."""
    return _cooled(problem, _frozen(problem), factor)


@jax.jit
def _cooled(problem: LoRAProblem, frozen: LoRAProblem, factor: jax.Array) -> LoRAProblem:
    other = dataclasses.replace(frozen, beta=problem.beta * factor**2)
    # c = output - target, of one target: the difference is that of the outputs.
    moved = dense_terms(other)["c"] - dense_terms(frozen)["c"]
    return dataclasses.replace(problem, beta=other.beta, target=problem.target + moved)


def _noise_of_target(problem: LoRAProblem) -> Float[Array, "lq dv"]:
    return -_residual(_frozen(problem))


@jax.jit
def _residual(problem: LoRAProblem) -> Float[Array, "lq dv"]:
    return dense_terms(problem)["c"]


def laid_end_to_end(problems: Sequence[LoRAProblem]) -> LoRAProblem:
    """The head on its windows as one text: nothing that the model itself computes.

    Every query sees the keys of every window; the target is the frozen head's output there plus the
    windows' noise.
    """
    names = ("x_query", "x_key", "x_value")
    rows = {n: jnp.concatenate([getattr(p, n) for p in problems]) for n in names}
    noise = jnp.concatenate([_noise_of_target(p) for p in problems])
    long = dataclasses.replace(problems[0], **rows, target=noise)
    # _noise_of_target(long) = noise - output, so that 2 noise less it is output + noise.
    return dataclasses.replace(long, target=2 * noise - _noise_of_target(long))
