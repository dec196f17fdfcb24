"""The columns k of (*) whose moments the certificate reads, and the scales they are taken in.

The arrays of an adapter's gradient have many columns k. Each is divided by its scale sigma, and the
largest of their squares stands for all of them: one non-negative column z an adapter, not one an
entry. A column an array would make tighter bounds, and cost more time than that is worth.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import (
    frobenius,
    gamma,
    inner_rounding,
    projection_rounding,
    row_lengths,
)
from lora_limits.coordinates import collectives
from lora_limits.coordinates.balancing import balance
from lora_limits.coordinates.blocks import Keys
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.sampling import Sample
from lora_limits.linalg import columns_of, dot, down
from lora_limits.problem import NAMES, LoRAProblem

FIXED = ("one", "Z", "W")  # every problem needs these; the others are its adapters
MEMBERS = {
    "query": ("query.a", "query.b"),
    "key": ("key.a", "key.b"),
    "value": ("value.a", "value.b", "v", "va"),
}


class Columns(NamedTuple):
    """How to turn tokens into the non-negative columns of the certificate."""

    n3: Float[Array, "dv dv"]  # Z = N3 v, any invertible N3
    n3_inverse: Float[Array, "dv dv"]  # W = N3^-T v
    sigma: dict[str, jax.Array]  # {member: (n,)} scale of each entry of a column


def names(problem: LoRAProblem) -> tuple[str, ...]:
    """Names of the columns, in the order in which `measure` stacks them."""
    return FIXED + tuple(name for name in NAMES if name in problem.adapters)


def _key_columns(problem: LoRAProblem, xk, k, xk_b, xv, v, xv_b) -> dict[str, jax.Array]:
    """The columns k of (*) by member, tokens last; all centred by the caller.

    xk, xv: (n, d_in); k: (d, n); v: (d_value, n); xk_b, xv_b: (r, n).
    """
    out = {}
    adapters = problem.adapters
    if "query" in adapters:
        out["query.a"] = k
        out["query.b"] = dot(adapters["query"].a, k)
    if "key" in adapters:
        out["key.a"] = xk_b
        out["key.b"] = xk.T
    if "value" in adapters:
        out["value.a"] = xv_b
        out["value.b"] = xv.T
        out["v"] = v
        out["va"] = dot(adapters["value"].a, v)
    return out


class Measured(NamedTuple):
    """The columns of a block of tokens."""

    squares: Float[Array, "columns n"]  # z, by `names`
    sums: dict[str, jax.Array]  # {adapter: (entries,)} sum_j w_j k_j of all its k, over sigma


def measure(problem: LoRAProblem, columns: Columns, t: Keys, k: Float[Array, "d n"]) -> Measured:
    """The non-negative columns of a block of tokens, and their weighted sums; k: centred keys."""
    table = _key_columns(problem, t.xk, k, t.xk_b, t.xv, t.v, t.xv_b)
    scaled = {
        name: jnp.concatenate([table[m] * (1 / columns.sigma[m])[:, None] for m in MEMBERS[name]])
        for name in names(problem)[len(FIXED) :]
    }
    one = jnp.ones_like(t.w)
    z = down(dot(columns.n3, t.v) ** 2)
    w = down(dot(columns.n3_inverse, t.v) ** 2)
    largest = [(x**2).max(0)[None] for x in scaled.values()]
    sums = {name: dot(x, t.w.T)[:, 0] for name, x in scaled.items()}
    return Measured(jnp.concatenate([one, z, w, *largest]), sums)


def zero_sums(problem: LoRAProblem, columns: Columns) -> dict[str, jax.Array]:
    """The sums of `measure` over no token."""
    return {
        name: jnp.zeros_like(jnp.concatenate([columns.sigma[m] for m in MEMBERS[name]]))
        for name in names(problem)[len(FIXED) :]
    }


def offsets(problem: LoRAProblem, sums: dict[str, jax.Array]) -> Float[Array, " columns"]:
    """max over entries of |sum_j w_j k_j| / sigma of every column, by `names`; 0 for the fixed."""
    nothing = jnp.zeros((), problem.dtype)
    found = [jnp.abs(sums[name]).max() for name in names(problem)[len(FIXED) :]]
    return jnp.stack([nothing] * len(FIXED) + found)


def make(problem: LoRAProblem, sample: Sample, axis: Axis = None) -> Columns:
    """Scales and whitening, from a sample: any values are valid, these make the bound tight.

    O(m d_model d) for m sampled tokens. axis: as in `frame.with_sample`; O(d_model + d_value^2)
    numbers cross it.
    """
    tiny = jnp.finfo(problem.dtype).tiny ** 0.5
    w = sample.w / (collectives.total(sample.w.sum(), axis) + tiny)
    b = {name: problem.adapters[name].b for name in problem.adapters}
    xk_b = columns_of(b["key"], sample.xk) if "key" in b else None
    xv_b = columns_of(b["value"], sample.xv) if "value" in b else None
    table = _key_columns(problem, sample.xk, sample.k, xk_b, sample.xv, sample.v, xv_b)
    c = sample.residual
    on_c = dot(c.T, c) / c.shape[0]
    on_v = dot(sample.v * w[None], sample.v.T)
    means = {name: (w[None] * z**2).sum(1) for name, z in table.items()}
    on_c, on_v, means = collectives.total((on_c, on_v, means), axis)
    # a floor, so that an entry the sample missed does not inflate the shared column
    sigma = {name: jnp.sqrt(m + 0.05 * m.mean()) + tiny for name, m in means.items()}
    reach = [row_lengths(x).max() for x in (sample.xk, sample.xv)]
    for name, floor in entry_rounding(problem, *collectives.largest(reach, axis)).items():
        sigma[name] = sigma[name] + floor
    return Columns(*balance(on_c, on_v), sigma)


def entry_rounding(problem: LoRAProblem, key_reach, value_reach) -> dict[str, jax.Array]:
    """Rounding of an entry of each centred column, given the longest rows of the centred inputs."""
    out = {}
    adapters = problem.adapters
    key = projection_rounding(problem, "key") * key_reach
    value = projection_rounding(problem, "value") * value_reach
    if "query" in adapters:
        out["query.a"] = key
        out["query.b"] = 2 * key * frobenius(adapters["query"].a)
    if "key" in adapters:
        out["key.a"] = 3 * inner_rounding(problem, "key") * key_reach
        out["key.b"] = gamma(problem, 4) * key_reach
    if "value" in adapters:
        out["value.a"] = 3 * inner_rounding(problem, "value") * value_reach
        out["value.b"] = gamma(problem, 4) * value_reach
        out["v"] = value
        out["va"] = 2 * value * frobenius(adapters["value"].a)
    return out
