"""What is promised of a gradient by rows: the sum over queries of what each may be to blame for, and the
promise with a probability, from the same ranges and exact rows of a few queries.

Truncation (by_rows_range.py) and rounding (by_rows_rounding.py) of the same rows, added. In double
precision; of a narrower problem the same numbers are certified in double precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate import bound
from lora_limits.certificate.bound import Parts, arrays_of, known, outward
from lora_limits.estimate import masked_rows
from lora_limits.estimate.rows import Terms
from lora_limits.gradients import (
    by_rows,
    by_rows_error,
    by_rows_range,
    by_rows_rounding,
    confidence,
)
from lora_limits.heads.tokens import sees_of
from lora_limits.linalg import widened
from lora_limits.method import Sampling
from lora_limits.problem import Adapter, LoRAProblem


class Told(NamedTuple):
    """As in GradientResult."""

    bound: dict[str, Adapter]
    confident: dict[str, Adapter] | None


class Ranges(NamedTuple):
    """What each query may add to the error of each array, by `arrays_of`; 0 for one without a share."""

    truncation: Float[Array, "arrays lq"]
    rounding: Float[Array, "arrays lq"]
    lost: Float[Array, ""]  # by any entry, to operations that underflow


def ranges(problem: LoRAProblem, method: Any, found: by_rows.Solved) -> Ranges:
    """Rounded outward; infinite where the first-order analysis of rounding does not hold.

    O(L k_t + L (d + d_value + d_model r)) time, at most 8 columns through k_t features, t the largest
    even number up to the degree.
    """
    rows, outputs = found.rows, found.outputs
    keys = by_rows_range.keys_of(problem, rows)
    of_sum, lost = by_rows_rounding.lost(problem, rows, outputs, method.degree)
    summed = by_rows_rounding.chain(problem, method)
    query = by_rows_range.queries_of(problem, method, rows, keys, summed, of_sum)
    side = by_rows_rounding.sides(problem, rows, keys, query)
    sure = by_rows_rounding.certain(problem, method, outputs, rows, keys, query, side)
    truncation = by_rows_range.shares(
        problem, method, rows, keys, query, sure.total, sure.c, sure.m
    )
    rounding = by_rows_rounding.shares(problem, method, rows, keys, query, side, sure)

    def certain(x: Float[Array, "arrays lq"]) -> Float[Array, "arrays lq"]:
        # a query of which nothing is certain has no range; one without a share needs none
        x = jnp.where(sure.holds[None] & ~jnp.isnan(x), x, jnp.inf)
        return jnp.where(outputs.counts[None], x, 0)

    truncation, rounding = outward(problem, truncation, rounding)
    return Ranges(certain(truncation), certain(rounding), lost)


def of_row(problem: LoRAProblem, method: Any, each: Ranges, rows: int) -> Float[Array, "arrays lq"]:
    """Rounding of the share of a query that is written out: of longer sums than those of the sweeps."""
    longer = by_rows_rounding.chain_of_row(problem, method, rows)
    grown = max(1.0, longer / by_rows_rounding.chain(problem, method))
    return confidence.COMPUTED * grown * each.rounding


def _parts(problem: LoRAProblem, found: by_rows.Solved, each: Ranges) -> dict[str, Adapter]:
    """{name: Adapter(a=Parts, b=Parts)}: sums over queries."""
    made = {}
    for i, (name, half) in enumerate(arrays_of(problem)):
        rest = by_rows_rounding.own(problem, getattr(found.gradient[name], half)) + each.lost
        made[name, half] = Parts(each.truncation[i].sum(), each.rounding[i].sum(), known(rest))
    return {name: Adapter(made[name, "a"], made[name, "b"]) for name in problem.adapters}


def told(
    problem: LoRAProblem, method: Any, found: by_rows.Solved, sampling: Sampling | None
) -> Told:
    """The bounds of a settled problem in double precision; infinite for series other than Taylor's.

    O(rows L (d + d_value + r (d + d_model))) time beside `ranges`, where rows are sampled.
    """
    if method.series != "taylor":
        nothing = jnp.full((), jnp.inf, problem.dtype)
        unbounded = {name: Adapter(nothing, nothing) for name in problem.adapters}
        return Told(unbounded, None if sampling is None else unbounded)
    each = ranges(problem, method, found)
    parts = _parts(problem, found, each)
    certified = bound.bounds_of(parts)
    if sampling is None:
        return Told(certified, None)
    head = by_rows_error.head_of(problem, found.rows)
    kernel = by_rows_error.kernel_of(problem, method, found.rows)

    def terms_of(index: jax.Array) -> dict[str, Adapter]:
        # a share is no sum of few outer products: each of its entries stands for itself
        errors = masked_rows.row_errors(problem, head, sees_of(problem), kernel, index)

        def written_out(e):
            return Terms(e.reshape(1, len(index), -1), jnp.ones((1, len(index), 1), e.dtype))

        return jax.tree.map(written_out, errors)

    sure = confidence.confident(
        problem,
        parts,
        each.truncation,
        of_row(problem, method, each, sampling.rows),
        found.gradient,
        sampling,
        terms_of,
    )
    return Told(certified, sure)


def told_of_narrow(
    problem: LoRAProblem, method: Any, found: by_rows.Solved, sampling: Sampling | None
) -> Told:
    """The bounds of a gradient in less than double precision: of the same numbers in double precision,
    and the distance to that gradient.
    """

    def wide(leaf):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return widened(leaf, jnp.float64) if floating else leaf

    if method.series != "taylor":
        return told(problem, method, found, sampling)
    with jax.enable_x64(True):
        problem = jax.tree.map(wide, problem)
        again = by_rows.solve(problem, method)
        of_wide = told(problem, method, again, sampling)
        return jax.tree.map(
            lambda bounds: bound.with_distance(bounds, found.gradient, again.gradient),
            of_wide,
            is_leaf=lambda x: isinstance(x, dict),
        )
