"""Blocks of tokens in the coordinates of a frame, one product for each kind of token.

Everything that is linear in an input row and wanted in every sweep comes from one matrix: the
frame's change of coordinates, the key's log-weight and the adapter's B are multiplied into the
projection once, before the sweeps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.coordinates.frame import Frame, rows
from lora_limits.linalg import columns_of, dot
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem, scalars


class Maps(NamedTuple):
    """What takes a centred input row (d_model,) to the sweeps' coordinates.

    query: (d_model, d + r) to x and X_Q B; key: (d_model, d + 1 + r) to y, the log-weight and X_K
    B; value:
    (d_model, d_value + r) to v and X_V B. The r columns are there for the adapters that there are.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array


class Keys(NamedTuple):
    """One block of keys: inputs (n, d_model) as they lie in memory, all else tokens last."""

    xk: jax.Array  # centred
    xv: jax.Array  # centred
    v: jax.Array  # (d_value, n) centred
    w: jax.Array  # (1, n) weights, 0 on tokens seen before
    y: jax.Array  # (d, n)
    xk_b: jax.Array  # (r, n) X_K B, centred; empty without an adapter
    xv_b: jax.Array  # (r, n) X_V B, centred


class Queries(NamedTuple):
    """One block of queries."""

    xq: jax.Array  # (n, d_model) inputs
    x: jax.Array  # (d, n)
    xq_b: jax.Array  # (r, n) X_Q B


def block_size(problem: LoRAProblem, degree: int) -> int:
    """Tokens to a block.

    On a CPU a power of two from 128 to 2048 whose largest array has about 2^20 entries, to stay in
    cache; on an accelerator, which must be filled, the largest equal parts of the input of at most
    2^25 entries.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    r = problem.adapters["value"].a.shape[0] if "value" in problem.adapters else 0
    entries = max(monomials.count(d, degree), d * (1 + dv + r))
    if jax.default_backend() == "cpu":
        return 2 ** min(max((2**20 // entries).bit_length() - 1, 7), 11)
    tokens = max(problem.x_query.shape[0], problem.x_key.shape[0])
    return -(-tokens // -(-tokens // max(2**25 // entries, 128)))


def maps(problem: LoRAProblem, frame: Frame) -> Maps:
    """The three matrices. O(d_model d (d + r))."""
    scale, beta = scalars(problem)

    def folded(name: str, change: jax.Array) -> jax.Array:  # (W + s B A) change, and B
        matrix = dot(getattr(problem.weights, name), change)
        if name not in problem.adapters:
            return matrix
        adapter = problem.adapters[name]
        return jnp.concatenate(
            [matrix + scale * dot(adapter.b, dot(adapter.a, change)), adapter.b], 1
        )

    change = jnp.concatenate([frame.to_y.T, beta * frame.nu[:, None]], 1)
    eye = jnp.eye(frame.v_mean.shape[0], dtype=problem.dtype)
    return Maps(folded("query", frame.to_x.T), folded("key", change), folded("value", eye))


def keys(problem: LoRAProblem, frame: Frame, table: Maps, first, fresh, block: int) -> Keys:
    """Keys and values first .. first + block, those not `fresh` with weight 0."""
    d = frame.nu.shape[0]
    dv = frame.v_mean.shape[0]
    xk = rows(problem.x_key, first, block)
    xv = rows(problem.x_value, first, block)
    # inputs are centred before they are projected: a large common bias then costs no digits
    on_key = columns_of(table.key, xk - frame.k_shift[None])
    xv = xv - frame.xv_mean[None]
    on_value = columns_of(table.value, xv)
    log_w = on_key[d : d + 1] - (frame.shift - scalars(problem)[1] * dot(frame.mu, frame.nu))
    w = jnp.where(fresh[None], jnp.exp(log_w), 0)
    rest = dot(table.key[:, d + 1 :].T, frame.xk_mean - frame.k_shift)[:, None]
    return Keys(
        xk - frame.xk_mean[None],
        xv,
        on_value[:dv],
        w,
        on_key[:d],
        on_key[d + 1 :] - rest,
        on_value[dv:],
    )


def queries(problem: LoRAProblem, frame: Frame, table: Maps, first, block: int) -> Queries:
    """Queries first .. first + block."""
    d = frame.nu.shape[0]
    xq = rows(problem.x_query, first, block)
    on_query = columns_of(table.query, xq - frame.q_shift[None])
    return Queries(
        xq, on_query[:d], on_query[d:] + dot(table.query[:, d:].T, frame.q_shift)[:, None]
    )
