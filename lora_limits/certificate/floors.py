"""Rounding of the projected tokens, in proportion to |x||W|: what centring by cancellation leaves."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.columns import Columns, entry_rounding
from lora_limits.certificate.rounding import projection_rounding, unit_roundoff
from lora_limits.coordinates.frame import Frame
from lora_limits.linalg import column_norms, dot, frobenius, row_norms
from lora_limits.problem import LoRAProblem


class Floors(NamedTuple):
    """Rounding of the columns and of the tokens they are made from."""

    columns: dict[str, jax.Array]  # {name: ()} of an entry of the column, over the smallest sigma
    key: Float[Array, ""]  # of a centred key
    value: Float[Array, ""]  # of a centred value
    v_mean: Float[Array, ""]  # of v_mean
    query: Float[Array, ""]  # of a query, over |x|
    mixing: Float[Array, ""]  # (K A^T) from independent errors in K: root of A^2 sigma^2 over sigma


class QueryRounding(NamedTuple):
    """Rounding that a block of queries brings along, first order in epsilon."""

    score: Float[Array, "1 n"]  # of every score of the query
    query: Float[Array, "1 n"]  # of the query itself
    length: Float[Array, "1 n"]  # of its inputs, centred, and of their centre


def make(problem: LoRAProblem, frame: Frame, columns: Columns, key_reach, value_reach) -> Floors:
    """The floors of a problem; key_reach, value_reach: longest rows of the centred inputs.

    O(d_model d).
    """
    entries = entry_rounding(problem, key_reach, value_reach)
    per_value = projection_rounding(problem, "value")
    mixing = jnp.ones((), problem.dtype)
    if "query" in problem.adapters:
        a = problem.adapters["query"].a
        spread = jnp.sqrt(dot(a**2, columns.sigma["query.a"] ** 2))
        mixing = (spread / columns.sigma["query.b"]).max()
    return Floors(
        columns={name: v / columns.sigma[name].min() for name, v in entries.items()},
        key=projection_rounding(problem, "key") * key_reach,
        value=per_value * value_reach,
        v_mean=per_value * frobenius(frame.xv_mean),
        query=projection_rounding(problem, "query"),
        mixing=mixing,
    )


def query_rounding(
    problem: LoRAProblem,
    frame: Frame,
    floors: Floors,
    xq: Float[Array, "n dq"],
    x: Float[Array, "d n"],
    reach: Float[Array, ""],
) -> QueryRounding:
    """xq: inputs; x: the same in the frame's coordinates; reach: the longest key in them.

    Log-weights are scores against nu, so their rounding is part of that of the scores.
    """
    length = row_norms(xq - frame.q_shift[None])[None] + frobenius(frame.q_shift)
    norm = column_norms(x)
    # what a rounded query, a rounded key and a rounded log-weight each move s_ij by
    of_query = floors.query * length
    by_query = frobenius(frame.to_x) * of_query * reach
    by_key = frobenius(frame.to_y) * floors.key * norm
    by_weight = 2 * frame.beta * frobenius(frame.nu) * floors.key
    # and the inner product of d terms itself
    by_product = 2 * x.shape[0] ** 0.5 * unit_roundoff(problem) * norm * reach
    return QueryRounding(by_query + by_key + by_weight + by_product, of_query, length)
