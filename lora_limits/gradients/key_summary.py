"""First sweep of the fast gradient, over keys: all that a query will ever read of them.

M = sum_j w_j phi(y_j) [1, v_j, X_V,j B], and beside it what the certificate and the series need of
the keys: moments, and the longest tokens (sweeps.py has the whole derivation).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate import columns, row_bounds
from lora_limits.certificate.rounding import column_lengths, row_lengths
from lora_limits.certificate.row_bounds import KeyMoments
from lora_limits.coordinates import collectives
from lora_limits.coordinates.blocks import Keys
from lora_limits.coordinates.sweep import sweep
from lora_limits.gradients.plan import Plan
from lora_limits.linalg import dot
from lora_limits.polynomial import monomials
from lora_limits.problem import project_columns


class Longest(NamedTuple):
    """The longest centred input rows, over all keys."""

    key: Float[Array, ""]
    value: Float[Array, ""]


class Summary(NamedTuple):
    """What the first sweep leaves of the keys: all that a query will ever read of them."""

    m: Float[Array, "k columns"]  # M
    moments: KeyMoments  # of the certificate's columns; of no column where nothing is certified
    longest: Longest


class KeySums(NamedTuple):
    """Sums over the keys seen so far."""

    m: jax.Array
    checked: jax.Array  # the certificate's columns against features; see `_low_and_top`
    radial: jax.Array
    second: jax.Array
    mean: jax.Array
    columns: dict[str, jax.Array]


class KeyMaxima(NamedTuple):
    """Largest values over the keys seen so far."""

    reach: jax.Array  # |y_j|
    box: jax.Array  # |y_j| by coordinate
    key: jax.Array  # the longest centred inputs
    value: jax.Array
    lightest: jax.Array  # - w_j


class Part(NamedTuple):
    """What a part of the keys leaves: those of one device, or of one chunk."""

    sums: KeySums
    largest: KeyMaxima

    def joined(self, other: Part) -> Part:
        """That of both parts together."""
        sums = jax.tree.map(jnp.add, self.sums, other.sums)
        return Part(sums, jax.tree.map(jnp.maximum, self.largest, other.largest))


def summarise(plan: Plan) -> Summary:
    """First sweep, over the keys of all devices."""
    part = visit(plan)
    sums = collectives.total(part.sums, plan.axis)
    return summary(plan, Part(sums, collectives.largest(part.largest, plan.axis)))


def visit(plan: Plan) -> Part:
    """First sweep, over the keys that the problem of the plan holds."""
    problem, dtype, d = plan.problem, plan.problem.dtype, plan.width
    whole = row_bounds.whole(plan.degree)
    count = len(columns.names(problem)) if plan.columns is not None else 0
    zero = jnp.zeros((), dtype)
    checked = (plan.features, count) if whole else (plan.features_below, 2 * count)
    start = KeySums(
        m=jnp.zeros((plan.features, 1 + plan.maps.value.shape[1]), dtype),
        checked=jnp.zeros(checked, dtype),
        radial=jnp.zeros((plan.degree + 1, count), dtype),
        second=jnp.zeros((d, d), dtype),
        mean=jnp.zeros(d, dtype),
        columns={} if plan.columns is None else columns.zero_sums(problem, plan.columns),
    )

    def body(carry, first, fresh):
        sums, largest = carry
        t = plan.keys(first, fresh)
        parts = monomials.by_degree(t.y, plan.degree)
        # w [1, v, X_V B]
        z = jnp.concatenate([jnp.ones_like(t.w), t.v, t.xv_b]) * t.w
        xk = t.xk + (plan.frame.xk_mean - plan.frame.k_shift)[None]
        sums = sums._replace(m=sums.m + monomials.products(parts, z))
        if plan.columns is not None:
            sums = _add_moments(plan, plan.columns, sums, t, xk, parts)
        found = KeyMaxima(
            reach=jnp.where(fresh[None], column_lengths(t.y), 0).max(),
            box=jnp.where(fresh[None], jnp.abs(t.y), 0).max(1),
            key=row_lengths(xk).max(),
            value=row_lengths(t.xv).max(),
            lightest=jnp.where(fresh[None], -t.w, -1).max(),
        )
        return sums, jax.tree.map(jnp.maximum, largest, found)

    least = KeyMaxima(zero, jnp.zeros(d, dtype), zero, zero, zero - 1)
    return Part(*sweep(problem.x_key.shape[0], plan.block, body, (start, least)))


def summary(plan: Plan, part: Part) -> Summary:
    """What is read of all keys, from their sums and maxima."""
    sums, largest = part
    low, top = _low_and_top(plan, sums.checked)
    nothing = jnp.zeros(0, plan.problem.dtype)
    moments = KeyMoments(
        low=low,
        top=top,
        radial=sums.radial,
        second=sums.second,
        mean=sums.mean,
        offset=columns.offsets(plan.problem, sums.columns) if sums.columns else nothing,
        reach=largest.reach,
        box=largest.box,
        lightest=-largest.lightest,
    )
    return Summary(sums.m, moments, Longest(largest.key, largest.value))


def _add_moments(
    plan: Plan, scales: columns.Columns, sums: KeySums, t: Keys, xk: jax.Array, parts: list
) -> KeySums:
    """Adds the moments of the certificate's columns over a block of keys, xk their inputs."""
    # the key itself, not y taken back: that would cost digits that the certificate counts on
    k = project_columns(plan.problem, "key", xk)
    measured = columns.measure(plan.problem, scales, t, k)
    zc = measured.squares * t.w
    norm = column_lengths(t.y)
    if row_bounds.whole(plan.degree):
        checked = monomials.products(parts, zc)
    else:
        # |y|^{g-t}, g - t = 1 unless the degree is 0
        odd = zc * norm if plan.degree else zc
        below = jnp.concatenate(parts[: max(plan.degree, 1)])
        checked = dot(below, jnp.concatenate([zc, odd]).T)
    return sums._replace(
        checked=sums.checked + checked,
        radial=sums.radial + dot(row_bounds.powers(norm, plan.degree), zc.T),
        second=sums.second + dot(t.y, (t.y * t.w).T),
        mean=sums.mean + dot(t.y, t.w.T)[:, 0],
        columns=jax.tree.map(jnp.add, sums.columns, measured.sums),
    )


def _low_and_top(plan: Plan, checked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(low, top) of KeyMoments from the sums of the first sweep.

    With an even degree both lie one behind the other in the sums of all features; else the sums are
    of the features below the top degree, for the columns and for the columns times |y|.
    """
    if row_bounds.whole(plan.degree):
        return checked[: plan.features_below], checked[plan.features_below :]
    count = checked.shape[1] // 2
    of_top = monomials.count(plan.width, plan.degree - 2) if plan.degree else 0
    return checked[:, :count], checked[of_top:, count:]
