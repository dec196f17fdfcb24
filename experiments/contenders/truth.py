"""What is true, and how far from it: exact gradients and outputs, errors relative to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_limits as ll
from experiments.contenders import baselines
from lora_limits.instruments.comparing import frobenius_error, max_error, named
from lora_limits.problem import projections, scalars

REFERENCE_TILE = 1024
FLOAT64_LENGTH = 4096  # up to here the gradient is in float64
ROWS = 1024  # queries on which the forward error is measured


class Reference(NamedTuple):
    """What is true: adapter gradients, and the outputs of the queries `rows`."""

    gradient: dict[str, np.ndarray]
    rows: np.ndarray
    output: np.ndarray


def of_gradient(gradient: Mapping[str, Any]) -> Reference:
    """A gradient taken for the truth, without outputs."""
    return Reference(named(gradient), np.arange(0), np.empty((0, 0)))


def _doubled(problem: ll.LoRAProblem) -> ll.LoRAProblem:
    """The problem in float64; to be called, and used, with 64 bits enabled."""
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), jnp.float64) if np.ndim(x) else x, problem
    )


def reference(problem: ll.LoRAProblem) -> Reference:
    """The tiled exact gradient, in float64 up to FLOAT64_LENGTH tokens and beyond that in float32
    at full precision.

    The outputs, of ROWS evenly spaced queries, are always in float64.
    """
    length = problem.target.shape[0]
    run = jax.jit(lambda p: ll.gradient(p, ll.Exact(REFERENCE_TILE)).gradient)
    rows = np.linspace(0, length - 1, min(length, ROWS)).astype(int)
    with jax.enable_x64(True):
        double = _doubled(problem)
        want = named(run(double)) if length <= FLOAT64_LENGTH else None
        q, k, v = projections(double)
        out = np.asarray(jax.jit(baselines.row_blocked(128))(q[rows], k, v, scalars(double)[1]))
    return Reference(named(run(problem)) if want is None else want, rows, out)


def errors(gradient: Mapping[str, Any], true: Reference) -> dict[str, Any]:
    """Relative Frobenius error of each array, the largest of them, and the largest relative error
    in max norm.
    """
    got = named(gradient)
    each = {name: frobenius_error(x, true.gradient[name]) for name, x in got.items()}
    worst = max(max_error(x, true.gradient[name]) for name, x in got.items())
    return {"errors": each, "error": max(each.values()), "max_error": worst}


def relative_bound(bound: Mapping[str, Any], true: Reference) -> float:
    """The largest certified bound over the largest entry of its array."""
    sizes = {name: float(np.abs(x).max()) for name, x in true.gradient.items()}
    return max(float(b) / sizes[name] for name, b in named(bound).items())
