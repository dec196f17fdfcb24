"""The non-negative columns z whose moments the certificate reads, their scales, and how far
rounding moves them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.coordinates import collectives
from lora_limits.coordinates.blocks import Keys
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.frame import Frame, balance, own, sample_rows, sample_weights
from lora_limits.linalg import columns_of, dot, down
from lora_limits.problem import LoRAProblem, project_columns, scalars

LAMBDA = 8.0
FIXED = ("one", "Z", "W")  # columns every problem needs; the others depend on which adapters it has


class Columns(NamedTuple):
    """How to turn tokens into the non-negative columns of the certificate. sigma: {name: (n,)}
    scale of each entry.
    """

    n3: jax.Array
    n3_inverse: jax.Array
    sigma: dict[str, jax.Array]


def _key_columns(problem: LoRAProblem, xk, k, xk_b, xv, v, xv_b) -> dict[str, jax.Array]:
    """The columns k of (*) per gradient array, tokens last: {"query.a": (d, n), ...}. All centred
    by the caller.

    xk, xv: (n, d_model); k: (d, n); v: (d_value, n); xk_b, xv_b: (r, n).
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


def _sample(problem: LoRAProblem, frame: Frame, axis: Axis):
    """Sampled tokens as `_key_columns` takes them."""
    xk, xv = (sample_rows(x, axis=axis) for x in (problem.x_key, problem.x_value))
    xv = xv - frame.xv_mean[None]
    k = project_columns(problem, "key", xk - frame.k_shift[None])
    v = project_columns(problem, "value", xv)
    xk = xk - frame.xk_mean[None]
    xk_b, xv_b = (
        columns_of(problem.adapters[n].b, x) if n in problem.adapters else None
        for n, x in (("key", xk), ("value", xv))
    )
    return xk, k, xk_b, xv, v, xv_b


def columns(problem: LoRAProblem, frame: Frame, axis: Axis = None) -> Columns:
    """Scales and whitening, from a sample: any values are valid, these make the bound tight.
    O(SAMPLE d_model d).

    axis: as in `frame.make`; O(d_model + d_value^2) crosses it.
    """
    tiny = jnp.finfo(problem.dtype).tiny ** 0.5
    w = sample_weights(problem, frame, axis)
    w = w / (collectives.total(w.sum(), axis) + tiny)
    sample = _sample(problem, frame, axis)
    xk = sample[0]
    xv = sample[3]
    v = sample[4]
    c = own(
        frame.v_mean[None] - sample_rows(problem.target, axis=axis), problem.target.shape[0], axis
    )
    means = {name: (w[None] * z**2).sum(1) for name, z in _key_columns(problem, *sample).items()}
    on_c, on_v, means = collectives.total(
        (dot(c.T, c) / c.shape[0], dot(v * w[None], v.T), means), axis
    )
    n3, n3_inverse = balance(on_c, on_v)
    sigma = {}
    for name, mean in means.items():
        # a floor, so that an entry the sample missed does not inflate the shared column
        sigma[name] = jnp.sqrt(mean + 0.05 * mean.mean()) + tiny
    reach = [jnp.sqrt((own(x, problem.x_key.shape[0], axis) ** 2).sum(1).max()) for x in (xk, xv)]
    reach = collectives.largest(reach, axis)
    for name, floor in _column_rounding(problem, *reach).items():
        sigma[name] = sigma[name] + floor
    return Columns(n3, n3_inverse, sigma)


def frobenius(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x**2).sum())


def unit_roundoff(problem: LoRAProblem) -> float:
    return LAMBDA * float(jnp.finfo(problem.dtype).eps) / 2


def rounding_unit(problem: LoRAProblem, k: int, degree: int, block: int, devices: int = 1) -> float:
    """LAMBDA sqrt(n) u: u the unit roundoff, n the longest chain of operations behind a moment or
    its evaluation.

    problem: what one of the `devices` holds.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    longest = max(problem.x_query.shape[0], problem.x_key.shape[0])
    n = (
        min(block, longest)
        + -(-longest // block)
        + (devices - 1)
        + k
        + 4 * degree
        + 4 * d
        + 2 * dv
        + 32
    )
    return LAMBDA * n**0.5 * float(jnp.finfo(problem.dtype).eps) / 2


def projection_rounding(problem: LoRAProblem, name: str) -> jax.Array:
    """Rounding of a row of x (W* + s B A) for |x| = 1: ()."""
    weight = getattr(problem.weights, name)
    size = frobenius(weight)
    n = weight.shape[0] + 2 * weight.shape[1] + 16
    if name in problem.adapters:
        a = problem.adapters[name].a
        b = problem.adapters[name].b
        size = size + jnp.abs(scalars(problem)[0]) * frobenius(a) * frobenius(b)
        n = n + a.shape[0]
    return unit_roundoff(problem) * n**0.5 * size


def _column_rounding(problem: LoRAProblem, key_reach, value_reach) -> dict[str, jax.Array]:
    """Rounding of an entry of each centred column, given the longest rows of the centred inputs:
    {name: ()}.
    """
    out = {}
    adapters = problem.adapters
    key = projection_rounding(problem, "key") * key_reach
    value = projection_rounding(problem, "value") * value_reach
    inner = {
        n: unit_roundoff(problem) * a.b.shape[0] ** 0.5 * frobenius(a.b)
        for n, a in adapters.items()
    }
    if "query" in adapters:
        out |= {"query.a": key, "query.b": 2 * key * frobenius(adapters["query"].a)}
    if "key" in adapters:
        out["key.a"] = 2 * inner["key"] * key_reach
    if "value" in adapters:
        out |= {
            "value.a": inner["value"] * value_reach,
            "v": value,
            "va": 2 * value * frobenius(adapters["value"].a),
        }
    return out


class Floors(NamedTuple):
    """Rounding of the projected tokens, in proportion to |x||W|: all that centring by cancellation
    leaves behind.
    """

    columns: dict[str, jax.Array]  # {name: ()} of an entry of the column, over the smallest sigma
    key: jax.Array  # () of a centred key
    value: jax.Array  # () of a centred value
    v_mean: jax.Array  # () of v_mean
    query: jax.Array  # () of a query, over |x|
    mixing: jax.Array  # () (K A^T) from independent errors in K: root of A^2 sigma^2 over sigma


def floors(problem: LoRAProblem, frame: Frame, cols: Columns, key_reach, value_reach) -> Floors:
    """The floors of a problem; key_reach, value_reach: longest rows of the centred inputs.
    O(d_model d).
    """
    entries = {
        n: v / cols.sigma[n].min()
        for n, v in _column_rounding(problem, key_reach, value_reach).items()
    }
    per_value = projection_rounding(problem, "value")
    mixing = jnp.ones((), problem.dtype)
    if "query" in problem.adapters:
        spread = jnp.sqrt(dot(problem.adapters["query"].a ** 2, cols.sigma["query.a"] ** 2))
        mixing = (spread / cols.sigma["query.b"]).max()
    return Floors(
        entries,
        projection_rounding(problem, "key") * key_reach,
        per_value * value_reach,
        per_value * frobenius(frame.xv_mean),
        projection_rounding(problem, "query"),
        mixing,
    )


def score_rounding(problem: LoRAProblem, frame: Frame, floors: Floors, xq, x, reach: jax.Array):
    """(rounding of every score of these queries, of the queries, their lengths), (1, n) each, first
    order in epsilon.

    xq: (n, d_model) inputs; x: (d, n) the same in the frame's coordinates; reach: () the longest
    key in them. Log-weights are scores against nu, so their rounding is part of it.
    """
    unit = unit_roundoff(problem)
    lengths = jnp.sqrt(((xq - frame.q_shift[None]) ** 2).sum(1))[None] + frobenius(frame.q_shift)
    d_query = floors.query * lengths
    norm = jnp.sqrt(down(x**2))
    d_log_weight = 2 * scalars(problem)[1] * frobenius(frame.nu) * floors.key
    d_score = (
        frobenius(frame.to_x) * d_query * reach
        + frobenius(frame.to_y) * floors.key * norm
        + d_log_weight
    )
    return d_score + 2 * x.shape[0] ** 0.5 * unit * norm * reach, d_query, lengths


def names(problem: LoRAProblem) -> tuple[str, ...]:
    """Names of the columns, in the order in which `measure` stacks them."""
    pairs = {
        "query": ("query.a", "query.b"),
        "key": ("key.a", "key.b"),
        "value": ("value.a", "value.b", "v", "va"),
    }
    return FIXED + tuple(
        c for n in ("query", "key", "value") if n in problem.adapters for c in pairs[n]
    )


def measure(problem: LoRAProblem, cols: Columns, t: Keys, k: jax.Array) -> jax.Array:
    """The non-negative columns of a block of tokens, k (d, n) its centred keys: (number of columns,
    n), by `names`.
    """
    table = _key_columns(problem, t.xk, k, t.xk_b, t.xv, t.v, t.xv_b)
    fixed = [jnp.ones_like(t.w), down(dot(cols.n3, t.v) ** 2), down(dot(cols.n3_inverse, t.v) ** 2)]
    shared = [
        ((table[n] / cols.sigma[n][:, None]) ** 2).max(0)[None]
        for n in names(problem)[len(FIXED) :]
    ]
    return jnp.concatenate(fixed + shared)
