"""The norms of the theorems, measured on a problem: the practitioner's conditions of Remark 5.2."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.heads.tokens import settled, tokens_of
from lora_limits.linalg import dot, row_norms
from lora_limits.problem import (
    LoRAProblem,
    as_jax,
    check_static,
    project,
    project_back,
    projections,
    scalars,
)
from lora_limits.problem_checks import structure_of

BLOCK = 512  # rows of a projection that are held at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormReport:
    """Max norms (largest absolute entry) and score bounds of a problem.

    query and key are the two factors of the scores, both of which Theorem 3.1 bounds by Gamma;
    query_through_key and x_key are the other pair of conditions of the full case (Theorem A.1).
    Scalars, but for the static `tokens`; (B, ...) where the report was made under vmap.
    """

    query: jax.Array  # of Q = X_Q (W*_Q + s B_Q A_Q)
    key: jax.Array  # of K
    query_centred: jax.Array  # after the shift that leaves f unchanged
    key_centred: jax.Array
    query_through_key: jax.Array  # of Q W_K^T
    x_key: jax.Array  # of X_K
    query_update: jax.Array  # of s X B A, what the adapter adds (Theorem 4.1); 0 without one
    key_update: jax.Array
    score_bound: jax.Array  # certified R >= max |S_ij| of the centred scores, as in Theorem 3.1
    score_bound_raw: jax.Array  # the same, uncentred
    tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def gamma(self) -> jax.Array:
        """Gamma of Theorem 3.1: the larger max norm of Q and K."""
        return jnp.maximum(self.query, self.key)

    @property
    def gamma_centred(self) -> jax.Array:
        """Gamma after centring: what the polynomial method pays for."""
        return jnp.maximum(self.query_centred, self.key_centred)

    @property
    def gamma_full(self) -> jax.Array:
        """Gamma of Theorem A.1: the largest of the four norms of the full case."""
        return jnp.maximum(self.gamma, jnp.maximum(self.query_through_key, self.x_key))

    @property
    def threshold(self) -> float:
        """sqrt(ln L): Gamma must stay below about this at beta = 1/d."""
        return math.sqrt(math.log(max(self.tokens, 2)))

    @property
    def gamma_ratio(self) -> jax.Array:
        """Gamma / sqrt(ln L), raw."""
        return self.gamma / self.threshold

    @property
    def score_ratio(self) -> jax.Array:
        """R / ln L, centred: easy while it goes to 0, hard above a constant (Theorem 4.1)."""
        return self.score_bound / self.threshold**2


class _Reach(NamedTuple):
    """Largest values over the rows H of one projection."""

    max: Float[Array, ""]  # |H|, entry by entry
    centred: Float[Array, ""]  # |H - centre|, entry by entry
    raw_norm: Float[Array, ""]  # of a row of H
    centred_norm: Float[Array, ""]  # of a row of H - centre
    norm: Float[Array, ""]  # of such a row in balanced coordinates
    box: Float[Array, " d"]  # of these, coordinate by coordinate
    update: Float[Array, ""]  # |s X B A|, entry by entry


def _reach(
    problem: LoRAProblem, name: str, centre: Float[Array, " d"], coordinates: Float[Array, "d d"]
) -> _Reach:
    """The largest values of a projection, block by block."""
    x = problem.x_query if name == "query" else problem.x_key
    zero = jnp.zeros((), problem.dtype)
    start = _Reach(zero, zero, zero, zero, zero, jnp.zeros_like(centre), zero)

    def body(carry, first, fresh):
        # The last block may reach back: a maximum may see a token twice.
        del fresh
        xs = rows(x, first, BLOCK)
        h = project(problem, name, xs)
        centred = h - centre[None]
        y = dot(centred, coordinates.T)
        update = zero
        if name in problem.adapters:
            adapter = problem.adapters[name]
            added = scalars(problem)[0] * dot(dot(xs, adapter.b), adapter.a)
            update = jnp.abs(added).max()
        new = _Reach(
            max=jnp.abs(h).max(),
            centred=jnp.abs(centred).max(),
            raw_norm=row_norms(h).max(),
            centred_norm=row_norms(centred).max(),
            norm=row_norms(y).max(),
            box=jnp.abs(y).max(0),
            update=update,
        )
        return jax.tree.map(jnp.maximum, carry, new)

    return sweep(x.shape[0], BLOCK, body, start)


def _through_key(problem: LoRAProblem) -> Float[Array, ""]:
    """max |Q W_K^T|, entry by entry, block by block."""

    def body(carry, first, fresh):
        # a maximum, as above
        del fresh
        q = project(problem, "query", rows(problem.x_query, first, BLOCK))
        return jnp.maximum(carry, jnp.abs(project_back(problem, "key", q)).max())

    return sweep(problem.x_query.shape[0], BLOCK, body, jnp.zeros((), problem.dtype))


def _of_rows(problem: LoRAProblem) -> NormReport:
    """The report of a settled problem through Q and K, turned, in memory."""
    root = jnp.sqrt(scalars(problem)[1])
    q, k, v = projections(problem)
    tokens = tokens_of(problem)
    # rows of tokens that do not count are zeros
    frame = frames.of_rows(root * q, root * k, v, tokens.query, tokens.key)
    one, other = tokens.query[:, None], tokens.key[:, None]
    q_centred = jnp.where(one, root * q - frame.nu[None], 0)
    k_centred = jnp.where(other, root * k - frame.mu[None], 0)
    x, y = frame.x(q_centred), frame.y(k_centred)
    balanced = jnp.minimum(
        row_norms(x).max() * row_norms(y).max(), dot(jnp.abs(x).max(0), jnp.abs(y).max(0))
    )
    given = row_norms(q_centred).max() * row_norms(k_centred).max()
    updates = {}
    for name in ("query", "key"):
        updates[name] = jnp.zeros((), problem.dtype)
        if name in problem.adapters:
            adapter = problem.adapters[name]
            added = dot(dot(getattr(problem, f"x_{name}"), adapter.b), adapter.a)
            updates[name] = jnp.abs(scalars(problem)[0] * added).max()
    return NormReport(
        query=jnp.abs(q).max(),
        key=jnp.abs(k).max(),
        query_centred=jnp.abs(q_centred / root).max(),
        key_centred=jnp.abs(k_centred / root).max(),
        query_through_key=_through_key(problem),
        x_key=jnp.abs(problem.x_key).max(),
        query_update=updates["query"],
        key_update=updates["key"],
        score_bound=jnp.minimum(balanced, given),
        score_bound_raw=scalars(problem)[1] * row_norms(q).max() * row_norms(k).max(),
        tokens=max(q.shape[0], k.shape[0]),
    )


def norm_report(problem: LoRAProblem) -> NormReport:
    """The norms of Theorems 3.1, 4.1 and A.1 and certified score bounds, raw and centred.

    The score bounds are Cauchy-Schwarz or box bounds, never below max |S_ij|, and not computed from
    the L x L scores. O(L d_model d) time, memory independent of L; jit and vmap apply.
    With masks, of the tokens that count: queries that are there and keys that one of them sees.
    With rotations, of Q and K after them: each row keeps its length, and so do the score bounds up
    to centring, while the max norm, Gamma, may be sqrt(2) times that of the rows before or 1 over
    that. The theorems' conditions are then on rotated rows. query_through_key is at distance 0,
    where rotations cancel. O(L d) memory there. A causal order takes pairs away and adds none: the
    bounds are of all pairs.
    Raises ValueError for names, shapes and dtypes that do not fit.
    """
    # Values are not looked at, so that a report may be traced.
    check_static(problem)
    problem = as_jax(problem)
    if structure_of(problem):
        return _of_rows(settled(problem))
    frame = frames.of_problem(problem)
    q = _reach(problem, "query", frame.nu, frame.to_x)
    k = _reach(problem, "key", frame.mu, frame.to_y)
    # |x . y| <= |x| |y|, and <= sum_i max |x_i| max |y_i|, in balanced coordinates; and the former
    # in the given ones, for where there are fewer tokens than d and nothing to balance by.
    balanced = jnp.minimum(q.norm * k.norm, dot(q.box, k.box))
    given = frame.beta * q.centred_norm * k.centred_norm
    return NormReport(
        query=q.max,
        key=k.max,
        query_centred=q.centred,
        key_centred=k.centred,
        query_through_key=_through_key(problem),
        x_key=jnp.abs(problem.x_key).max(),
        query_update=q.update,
        key_update=k.update,
        score_bound=jnp.minimum(balanced, given),
        score_bound_raw=frame.beta * q.raw_norm * k.raw_norm,
        tokens=max(problem.x_query.shape[0], problem.x_key.shape[0]),
    )
