"""What rounding does to a gradient by rows, worst case in double precision (certificate/rounding.py).

By lengths alone, query by query, as by_rows_range.py does for what the polynomial leaves out. Of
first order; SECOND makes up for products of two errors as long as none is above a thousandth.
For one query, with the notation there:

    V   = max(max_j |v_j|, |m|),   C = V + |v_mean| + |Y_i|     so |c|, |c~| <= C, |q_j| <= 2 C V
    A   >= sum_j w_j h^_j / D      h^: as h, of absolute values, P(|x_i||y_j|) for P(s)
    g   gamma of the longest chain of operations behind a sum over keys (`chain`)
    d   what every score of the query is rounded by, against all its others (`scores`)
    e   = g + 3 d

1. The sweeps against exact arithmetic on the same rows. Terms of a block's own scores are rounded by
   e^{2d} - 1 <= 2.1 d (d <= 1/100), all else by g of absolute sums, which A bounds. In order:

       D   e A D        m   2 e A V        c~  3 e A C        rho = c~ . m   6 e A C V
       q_j 11 e A C V   sum_j |p'_j| z_j, sum_j |p~_j| z_j     15 e A^2 C V max z
       sum_j |f~_j||c~| z_j                                     5 e A^2 C max z

2. The rows against those of exact projections. With rows of V rounded by e_v, f by e^{2d} - 1:

       c   2.1 d V + e_v      p   sum_j |p_j|: (11 d V + 4 e_v) C      f c   4.2 d C + e_v

   and the other sides, sum_j |p_j| <= 2 C V, by those of y and x, e_y and e_x.

3. After the rows: turned back, times X B or A, summed over tokens: `after` of A times 2 C V, or C.

In all 16 e A^2 + 4 A `after` of C V max z and 4 C e_v max z (`_rows`): 11 d <= 3 d * 16 - 2.1 d * 15.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.certificate.bound import SCORE, arrays_of
from lora_limits.certificate.floors import LIGHTEST
from lora_limits.certificate.rounding import (
    EXP_ULP,
    column_lengths,
    frobenius,
    gamma,
    projection_rounding,
    projection_size,
    row_lengths,
    tiny,
    unit_roundoff,
)
from lora_limits.certificate.row_bounds import FIRST_ORDER
from lora_limits.gradients import by_rows
from lora_limits.gradients.by_rows_range import FARTHEST, Keys, Query
from lora_limits.linalg import largest
from lora_limits.polynomial import series
from lora_limits.problem import LoRAProblem, inputs, scalars


class Sides(NamedTuple):
    """Rounding of the rows that the sweeps work on, in the 2-norm, and their sizes."""

    x: Float[Array, " lq"]  # of x_i
    y: Float[Array, ""]  # of any y_j
    v: Float[Array, ""]  # of any v_j
    score: Float[Array, " lq"]  # of a query's scores, against one another


class Sure(NamedTuple):
    """What is certain of every query, rounding included."""

    total: Float[Array, " lq"]  # D_i, from below
    absolute: Float[Array, " lq"]  # A
    c: Float[Array, " lq"]  # |c~_i|, from above
    m: Float[Array, " lq"]  # |m_i|, from above
    holds: Bool[Array, " lq"]  # whether first order is enough


def chain(problem: LoRAProblem, method: Any) -> float:
    """gamma of a sum over keys through features: over a block, over blocks, over k; there and back."""
    block = by_rows.block_size(problem, method)
    length = max(problem.x_query.shape[0], problem.x_key.shape[0])
    d, dv = problem.weights.query.shape[1], problem.weights.value.shape[1]
    over_tokens = min(block, length) + -(-length // block)
    k = by_rows.features(problem, method)
    return gamma(problem, 2 * (over_tokens + k + 4 * method.degree + 4 * d + 2 * dv + 32))


def chain_of_row(problem: LoRAProblem, method: Any, rows: int) -> float:
    """gamma of the share of a sampled query, scores and all, and of the mean of such shares."""
    length = problem.x_query.shape[0] + problem.x_key.shape[0]
    d, dv = problem.weights.query.shape[1], problem.weights.value.shape[1]
    widest = max(x.shape[1] for x in inputs(problem).values())
    own = 2 * (method.degree + 1) * (d + 2) + 4 * d + 2 * dv + 2 * widest
    return gamma(problem, 2 * (length + rows + own + 64))


def lost(problem: LoRAProblem, rows: by_rows.Rows, found: by_rows.Outputs, degree: int):
    """(what a sum over tokens and features may lose to operations that underflow, and what an entry
    of the gradient may).

    Each loses at most the smallest normal number, and is then multiplied by the features of a query
    and a key, and on the way to the gradient by 1 / D^2 and no more than eight of the factors below.
    """
    scale, beta = (jnp.abs(x) for x in scalars(problem))
    tokens = problem.x_query.shape[0] + problem.x_key.shape[0]
    x, y = (column_lengths(z).max() for z in (rows.x, rows.y))
    features = ((1 + x) * (1 + y)) ** (2 * degree)
    of_sum = 1e6 * tokens * tiny(rows.x) * features
    arrays = [rows.v, rows.centres.nu, rows.centres.v_mean, problem.target]
    sizes = [frobenius(z) for z in (*arrays, *inputs(problem).values())]
    matrices = (problem.weights, problem.adapters)
    parts = [m.a for m in matrices[1].values()] + [m.b for m in matrices[1].values()]
    parts += [matrices[0].query, matrices[0].key, matrices[0].value]
    sizes += [frobenius(z) for z in parts] + [scale, beta, 1 / beta, x, y]
    most = jnp.maximum(jnp.stack(sizes).max(), 1)
    least = jnp.min(found.normaliser, where=found.counts, initial=1.0)
    return of_sum, of_sum / least**2 * most**8


def sides(problem: LoRAProblem, rows: by_rows.Rows, keys: Keys, query: Query) -> Sides:
    """Step 2: what projections, rotations and centring leave rounded. O(L d_model)."""
    root = jnp.sqrt(scalars(problem)[1])
    d = problem.weights.query.shape[1]
    seen = rows.centres.w > 0

    def projected(name: str) -> Float[Array, ""]:
        # the projection; the root, a rotation, the centre
        size = projection_size(problem, name)
        return projection_rounding(problem, name) + gamma(problem, 64) * size

    x_key, x_value = (
        jnp.where(seen, row_lengths(z), 0).max() for z in (problem.x_key, problem.x_value)
    )
    nu = frobenius(rows.centres.nu)
    of_query = root * projected("query") * row_lengths(problem.x_query)
    of_query = of_query + 4 * unit_roundoff(problem) * nu
    of_key = root * projected("key") * x_key
    of_value = projected("value") * x_value
    # weights: exp of a rounded log-weight, from LIGHTEST upwards
    key = root * projection_size(problem, "key") * x_key
    of_weight = nu * (of_key + 4 * gamma(problem, d + 8) * key)
    of_exp = unit_roundoff(problem) * (4 * EXP_ULP - 4 * LIGHTEST + 8 * query.reach)
    by_rows_themselves = query.x * of_key + of_query * (keys.y + of_key)
    score = by_rows_themselves + of_weight + of_exp + gamma(problem, 2 * d) * query.reach
    return Sides(of_query, of_key, of_value, score)


def _lengths(rows: by_rows.Rows, target, keys: Keys, m: Float[Array, " lq"]):
    """(V, C) of every query."""
    v = jnp.maximum(keys.longest["v"], m)
    return v, v + frobenius(rows.centres.v_mean) + row_lengths(target)


def certain(
    problem: LoRAProblem,
    method: Any,
    found: by_rows.Outputs,
    rows: by_rows.Rows,
    keys: Keys,
    query: Query,
    side: Sides,
) -> Sure:
    """Step 1, of D, m and c~."""
    e = chain(problem, method) + 3 * side.score
    near = jnp.minimum(query.reach, FARTHEST)
    p = series.evaluate(series.taylor(method.degree, near.dtype), near)
    # |h| - h <= 2 (P(R) - 1) beyond the block, as |P(s) - 1| <= P(R) - 1; 0 in it
    absolute = found.total + 2 * query.flat * (p - 1)
    # where no other block counts the total is infinite, and nothing is beyond
    a = jnp.where(jnp.isinf(found.total), 1, absolute / found.total) * (1 + 2 * FIRST_ORDER)
    sure = (found.normaliser > 0) & (e * a <= FIRST_ORDER)
    total = found.total * (1 - 2 * FIRST_ORDER)
    m = row_lengths(found.mean)
    v, c = _lengths(rows, problem.target, keys, m)
    within = (side.score <= SCORE) & ((query.reach <= FARTHEST) | (query.flat == 0))
    holds = sure & within | ~found.counts
    size = row_lengths(found.residual) + 4 * e * a * c
    return Sure(total, a, size, m + 4 * e * a * v, holds)


def shares(
    problem: LoRAProblem,
    method: Any,
    rows: by_rows.Rows,
    keys: Keys,
    query: Query,
    side: Sides,
    sure: Sure,
) -> Float[Array, "arrays lq"]:
    """Rounding that each query may bring to an entry of each array, by `arrays_of`, before the scale."""
    e = chain(problem, method) + 3 * side.score
    length = max(problem.x_query.shape[0], problem.x_key.shape[0])
    widths = sum(problem.weights.query.shape) + problem.weights.value.shape[1]
    after = gamma(problem, 2 * (length + widths + 64))
    v, c = _lengths(rows, problem.target, keys, sure.m)
    # rows that are all cancellation are no longer than their rounding
    v, y, x_i = v + side.v, keys.y + side.y, query.x + side.x
    a = sure.absolute
    share = 16 * e * a**2 + 4 * after * a
    of_rows = share * c * v + 4 * c * side.v
    of_outputs = share * c + 4 * side.v
    root = jnp.sqrt(scalars(problem)[1])
    nu = frobenius(rows.centres.nu)
    seen = rows.centres.w > 0
    x = {name: row_lengths(z) for name, z in inputs(problem).items()}
    out = []
    for name, half in arrays_of(problem):
        adapter = problem.adapters[name]
        factor = (column_lengths(adapter.b) if half == "a" else row_lengths(adapter.a)).max()
        if name == "query":
            row = root * x["query"] * (of_rows * y + 2 * c * v * side.y)
        elif name == "key":
            on_query = 2 * of_rows * (x_i + nu) + 2 * c * v * side.x
            row = root * jnp.where(seen, x["key"], 0).max() * on_query
        else:
            row = jnp.where(seen, x["value"], 0).max() * of_outputs
        out.append(factor * row)
    return jnp.stack(out)


def own(problem: LoRAProblem, gradient: Array) -> Float[Array, ""]:
    """Of the last products, by the scale."""
    return 4 * unit_roundoff(problem) * largest(jnp.abs(gradient))
