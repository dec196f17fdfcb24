"""Blocks of tokens in the coordinates of a frame, one product for each kind of token.

Everything that is linear in an input row and wanted in every sweep comes from one matrix: the
frame's change of coordinates, the key's log-weight and the adapter's B are multiplied into the
projection once, before the sweeps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.sweep import rows
from lora_limits.linalg import columns_of, dot
from lora_limits.problem import LoRAProblem, scalars


class Maps(NamedTuple):
    """What takes a centred input row to the sweeps' coordinates.

    The columns X B are there for the adapters that there are.
    """

    query: Float[Array, "dq x_and_xb"]  # to x and X_Q B
    key: Float[Array, "dk y_w_and_xb"]  # to y, the log-weight and X_K B
    value: Float[Array, "dx v_and_xb"]  # to v and X_V B


class Keys(NamedTuple):
    """One block of keys and values: inputs as they lie in memory, all else tokens last."""

    xk: Float[Array, "n dk"]  # inputs of the keys, centred
    xv: Float[Array, "n dx"]  # inputs of the values, centred
    v: Float[Array, "dv n"]  # values, centred
    w: Float[Array, "1 n"]  # weights, 0 on tokens of the block before
    y: Float[Array, "d n"]  # balanced keys
    xk_b: Float[Array, "rk n"]  # X_K B, centred; empty without an adapter
    xv_b: Float[Array, "rv n"]  # X_V B, centred


class Queries(NamedTuple):
    """One block of queries."""

    xq: Float[Array, "n dq"]  # inputs
    x: Float[Array, "d n"]  # balanced queries
    xq_b: Float[Array, "rq n"]  # X_Q B


def _folded(problem: LoRAProblem, name: str, change: jax.Array) -> jax.Array:
    """[(W + s B A) change, B]: (d_in, d) times a change of coordinates (d, m), and B beside it."""
    matrix = dot(getattr(problem.weights, name), change)
    if name not in problem.adapters:
        return matrix
    adapter = problem.adapters[name]
    matrix = matrix + scalars(problem)[0] * dot(adapter.b, dot(adapter.a, change))
    return jnp.concatenate([matrix, adapter.b], 1)


def maps(problem: LoRAProblem, frame: Frame) -> Maps:
    """The three matrices. O(d_model d (d + r))."""
    to_y_and_weight = jnp.concatenate([frame.to_y.T, frame.beta * frame.nu[:, None]], 1)
    as_it_is = jnp.eye(frame.v_mean.shape[0], dtype=problem.dtype)
    return Maps(
        query=_folded(problem, "query", frame.to_x.T),
        key=_folded(problem, "key", to_y_and_weight),
        value=_folded(problem, "value", as_it_is),
    )


def keys(
    problem: LoRAProblem,
    frame: Frame,
    table: Maps,
    first: Int[Array, ""],
    fresh: Bool[Array, " n"],
    block: int,
) -> Keys:
    """Keys and values first .. first + block, those not `fresh` with weight 0."""
    d = frame.nu.shape[0]
    dv = frame.v_mean.shape[0]
    xk = rows(problem.x_key, first, block, problem.dtype)
    xv = rows(problem.x_value, first, block, problem.dtype) - frame.xv_mean[None]
    # inputs are centred before they are projected: a large common bias then costs no digits
    on_key = columns_of(table.key, xk - frame.k_shift[None])
    on_value = columns_of(table.value, xv)
    log_w = on_key[d : d + 1] - (frame.shift - frame.beta * dot(frame.mu, frame.nu))
    # X_K B loses the weighted mean whether the keys are centred or not
    rest = dot(table.key[:, d + 1 :].T, frame.xk_mean - frame.k_shift)
    return Keys(
        xk=xk - frame.xk_mean[None],
        xv=xv,
        v=on_value[:dv],
        w=jnp.where(fresh[None], jnp.exp(log_w), 0),
        y=on_key[:d],
        xk_b=on_key[d + 1 :] - rest[:, None],
        xv_b=on_value[dv:],
    )


def queries(
    problem: LoRAProblem, frame: Frame, table: Maps, first: Int[Array, ""], block: int
) -> Queries:
    """Queries first .. first + block."""
    d = frame.nu.shape[0]
    xq = rows(problem.x_query, first, block, problem.dtype)
    on_query = columns_of(table.query, xq - frame.q_shift[None])
    lost = dot(table.query[:, d:].T, frame.q_shift)
    return Queries(xq=xq, x=on_query[:d], xq_b=on_query[d:] + lost[:, None])
