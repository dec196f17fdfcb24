"""The gradient through a factor of f for problems with a causal order, rotations or padding.

A factor is made of the rotated rows, as if every query saw every key; then what no query sees is
taken out: f~ = M o (U V^T) + M o E + M o R, rows normalised. The low-rank part is summed over the
keys up to each query (prefix.py), entries and rows are masked where they lie. The first queries see
few keys, of which a factor of whole rows knows little: they are written out exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates import frame as frames
from lora_limits.factors.factor import (
    Factor,
    Rows,
    apply,
    apply_transposed,
    drop_rows,
    scale_rows,
    weighted,
)
from lora_limits.factors.kernel import kernel, kernel_transposed, with_ones, with_rho
from lora_limits.factors.prefix import prefix_kernel, prefix_sums
from lora_limits.heads.tokens import pattern_of, tokens_of
from lora_limits.heads.visibility import sees_any
from lora_limits.linalg import dot
from lora_limits.problem import Adapter, LoRAProblem, projections, pull_back, scalars

FIRST = 128  # queries of a causal problem that are exact, whatever the factor

Make = Callable[[jax.Array, jax.Array], tuple[Factor, jax.Array | None]]


class Made(NamedTuple):
    """A factor whose rows sum to 1 over what each query sees."""

    factor: Factor
    indicator: Float[Array, " lq"] | None  # where to look for errors
    smallest: Float[
        Array, ""
    ]  # row sum of the queries that are there, before they were divided out
    causal: bool


class Found(NamedTuple):
    """A gradient, its loss and its residual."""

    loss: Float[Array, ""]
    gradient: dict[str, Adapter]
    c: Float[Array, "lq dv"]


def make(problem: LoRAProblem, factor_of: Make) -> Made:
    """The factor of a settled problem by the `factor` of a FactorMethod."""
    root = jnp.sqrt(scalars(problem)[1])
    q, k, v = projections(problem)
    q, k = root * q, root * k
    tokens = tokens_of(problem)
    frame = frames.of_rows(q, k, v, tokens.query, tokens.key)
    x, y = frame.product(q - frame.nu[None], k - frame.mu[None], tokens.key, tokens.query)
    factor, indicator = factor_of(x, y)
    factor = factor._replace(right=jnp.where(tokens.key[:, None], factor.right, 0))
    if problem.causal:
        factor = _first_exactly(_masked(factor), x, y, tokens.key)
    total = _apply(factor, problem.causal, jnp.ones_like(v[:, :1]))[:, 0]
    counts = tokens.query & sees_any(pattern_of(problem), tokens, tokens.key, q.shape[0])
    total = jnp.where(counts, total, 1)
    factor = scale_rows(factor, jnp.where(counts, 1 / total, 0))
    return Made(factor, indicator, total.min(), problem.causal)


def _masked(factor: Factor) -> Factor:
    """Entries and rows without what comes after their query."""
    entries, exact = factor.entries, factor.rows
    if entries is not None:
        seen = entries.key[:, None, :] <= entries.query[:, :, None]
        entries = entries._replace(value=jnp.where(seen, entries.value, 0))
    if exact is not None:
        at = jnp.arange(exact.value.shape[1], dtype=exact.query.dtype)
        seen = at[None] <= exact.query[:, None]
        exact = exact._replace(value=jnp.where(seen, exact.value, 0))
    return Factor(factor.left, factor.right, entries, exact)


def _first_exactly(
    factor: Factor,
    x: Float[Array, "l d_and_1"],
    y: Float[Array, "l d_and_1"],
    exists: Bool[Array, " l"],
) -> Factor:
    """The factor with its first rows written out, over the keys that these see."""
    length = x.shape[0]
    at = jnp.arange(length, dtype=jnp.int32)
    few = at[:FIRST]
    seen = (at[None] <= few[:, None]) & exists[None]
    s = jnp.where(seen, dot(x[few], y.T), float(jnp.finfo(x.dtype).min))
    rows = Rows(few, jnp.where(seen, jax.nn.softmax(s, axis=1), 0))
    before = factor.rows
    if before is not None:
        kept = jnp.where((before.query >= FIRST)[:, None], before.value, 0)
        query = jnp.concatenate([rows.query, before.query.astype(jnp.int32)])
        rows = Rows(query, jnp.concatenate([rows.value, kept]))
    return drop_rows(factor, at < FIRST)._replace(rows=rows)


def _rest(factor: Factor) -> Factor:
    """Entries and rows alone."""
    return factor._replace(left=factor.left[:, :0], right=factor.right[:, :0])


def _apply(factor: Factor, causal: bool, z: Float[Array, "lk n"]) -> Float[Array, "lq n"]:
    """f~ z."""
    if not causal:
        return apply(factor, z)
    return prefix_sums(factor.left, factor.right, z) + apply(_rest(factor), z)


def gradient(problem: LoRAProblem, made: Made) -> Found:
    """As kernel.factored_gradient, all products over what each query sees.

    O(L (k d d_value + t (d + d_value) + d_model (d + r))) time, O(L (k + t) + k d d_value) memory;
    causal: O(L FIRST (k + d + d_value)) more of both.
    """
    factor, causal = made.factor, made.causal
    beta = scalars(problem)[1]
    q, k, v = projections(problem)
    # p~ 1 = 0: centred keys give the same gradient with less cancellation
    k = k - k.mean(0, keepdims=True)
    out = _apply(factor, causal, v)
    c = jnp.where(tokens_of(problem).query[:, None], out - problem.target, 0)
    big_c, big_h = with_rho(c, out), with_ones(v)

    def of_query():
        if not causal:
            return kernel(factor, big_c, big_h, k)
        low = prefix_kernel(factor.left, big_c, factor.right, big_h, k)
        return low + apply(weighted(factor, big_c, big_h), k)

    def of_key():
        if not causal:
            return kernel_transposed(factor, big_c, big_h, q)
        low = prefix_kernel(factor.right, big_h, factor.left, big_c, q, reverse=True)
        return low + apply_transposed(weighted(factor, big_c, big_h), q)

    def of_value():
        if not causal:
            return apply_transposed(factor, c)
        low = prefix_sums(factor.right, factor.left, c, reverse=True)
        return low + apply_transposed(_rest(factor), c)

    rows = {
        "query": lambda: beta * of_query(),
        "key": lambda: beta * of_key(),
        "value": of_value,
    }
    found = {name: pull_back(problem, name, rows[name]()) for name in problem.adapters}
    return Found(0.5 * (c**2).sum(), found, c)
