"""Rounding of the tokens themselves: columns, scores, weights; all in proportion to |x||W|.

Centred columns can be made of cancellation, so their rounding is not in proportion to what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.columns import MEMBERS, Columns, entry_rounding
from lora_limits.certificate.rounding import (
    EXP_ULP,
    column_lengths,
    frobenius,
    gamma,
    lost_root,
    projection_rounding,
    projection_size,
    row_lengths,
    unit_roundoff,
)
from lora_limits.coordinates.frame import Frame
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem

LIGHTEST = -600.0  # the least log-weight for which anything is promised; exp of it is far from 0


class Floors(NamedTuple):
    """Rounding of the columns and of the tokens they are made from."""

    columns: dict[str, jax.Array]  # {adapter: ()} of an entry of its column, in units of sigma
    key: Float[Array, ""]  # of a centred key
    lost: float  # to squares that underflow, of the root of a column's moment
    value: Float[Array, ""]  # of a centred value
    v_mean: Float[Array, ""]  # of v_mean
    query: Float[Array, ""]  # of a query, over |x|
    there_and_back: Float[Array, ""]  # what rounding grows by from to_x to to_y^T, over beta; >= 1
    defect: Float[Array, ""]  # |to_x^T to_y - beta I|: scores that the balancing changes
    keys: Float[Array, ""]  # the longest centred key
    from_x: Float[Array, ""]  # what rounding grows by from dx to dQ and dQ A^T, over beta sigma


class QueryRounding(NamedTuple):
    """Rounding that a block of queries brings along."""

    score: Float[Array, "1 n"]  # of every score of the query, against all the others
    query: Float[Array, "1 n"]  # of the query itself, or to_y^T x / beta in its place
    length: Float[Array, "1 n"]  # of its inputs, centred, and of their centre


def make(
    problem: LoRAProblem, frame: Frame, columns: Columns, key_reach, value_reach, parts: int = 1
) -> Floors:
    """The floors of a problem; key_reach, value_reach: longest rows of the centred inputs.

    O(d_model d).
    """
    entries = entry_rounding(problem, key_reach, value_reach)
    per_value = projection_rounding(problem, "value")
    eye = jnp.eye(frame.nu.shape[0], dtype=problem.dtype)
    sizes = frobenius(frame.to_x) * frobenius(frame.to_y)
    # nothing bounds the error of the decomposition behind the balancing, so it is measured
    defect = frobenius(dot(frame.to_x.T, frame.to_y) - frame.beta * eye)
    defect = defect + gamma(problem, frame.nu.shape[0] + 2) * (sizes + frame.beta)
    keys = projection_size(problem, "key") * key_reach
    back = jnp.maximum(sizes / frame.beta, 1)
    from_x = jnp.ones((), problem.dtype)
    if "query" in problem.adapters:
        # the gradient's column is to_x^T y / beta, which is k but for the rounding of y
        a = problem.adapters["query"].a
        entries["query.a"] = entries["query.a"] * back + defect / frame.beta * keys
        entries["query.b"] = entries["query.b"] * back + defect / frame.beta * keys * frobenius(a)
        # |to_x||y_j| may exceed beta |k_j|, entry by entry, by the condition of the balancing
        sigma = columns.sigma["query.a"]
        grown = frobenius(frame.to_y) * frobenius(sigma) / frame.beta
        to_q = grown * column_lengths(frame.to_x).max() / sigma.max()
        # the sums behind dQ A^T are those of dQ, and its own product comes on top
        through_a = column_lengths(dot(jnp.abs(frame.to_x), jnp.abs(a.T))).max()
        to_qa = 1 + grown * through_a / columns.sigma["query.b"].max()
        from_x = jnp.maximum(jnp.maximum(to_q, to_qa), 1)
    in_units = {name: v / columns.sigma[name].min() for name, v in entries.items()}
    largest = {
        name: jnp.stack([in_units[m] for m in MEMBERS[name]]).max() for name in problem.adapters
    }
    return Floors(
        columns=largest,
        key=projection_rounding(problem, "key") * key_reach,
        lost=lost_root(problem, parts),
        value=per_value * value_reach,
        v_mean=per_value * frobenius(frame.xv_mean),
        query=projection_rounding(problem, "query"),
        there_and_back=back,
        defect=defect,
        keys=keys,
        from_x=from_x,
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

    What all scores of a query have in common moves no weight of f, and is not counted.
    """
    length = row_lengths(xq - frame.q_shift[None])[None] + frobenius(frame.q_shift)
    norm = column_lengths(x)
    # what a rounded query (and its centre), a rounded key and its weight each move s_ij by
    of_query = floors.query * length
    by_query = 2 * frobenius(frame.to_x) * of_query * reach
    by_key = frobenius(frame.to_y) * floors.key * norm
    by_weight = 2 * frame.beta * frobenius(frame.nu) * floors.key
    # the exponential, and the subtraction before it, of a log-weight down to LIGHTEST
    by_weight = by_weight + unit_roundoff(problem) * (2 * EXP_ULP - 2 * LIGHTEST)
    # the inner product of d terms, and balancing that does not quite cancel
    by_product = gamma(problem, 2 * x.shape[0]) * norm * reach
    by_balance = floors.defect * projection_size(problem, "query") * length
    score = by_query + by_key + by_weight + by_product + by_balance * floors.keys
    query = of_query * floors.there_and_back + by_balance / frame.beta
    return QueryRounding(score, query, length)
