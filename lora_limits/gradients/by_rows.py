"""The polynomial gradient of problems with a causal order, rotations or masks: through Q, K and V.

Rotations stand between the projections and the scores, so that no sum over tokens can be taken in
the inputs (sweeps.py does that for plain problems). Here Q, K and V are rows in memory, turned;
the forward and the backward of polynomial attention run on them (heads/), and what they leave in
the rows is turned back and pulled back to the adapters:

    dl/dW_Q = X_Q^T [R_i^T dQ_i],   dl/dW_K = X_K^T [R_j^T dK_j],   dl/dW_V = X_V^T dV

Centres as in coordinates/frame.py, of rows and constant in the derivative but for mu, which is the
mean of the keys under constant weights and moves with them (uncentred it is 0, and moves all the
same: the gradient of the keys sums to 0, as the exact one's does). They are made of the queries that
there are and the keys that those see; f does not depend on them, whoever sees whom.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.checks import fail
from lora_limits.coordinates.balancing import balance
from lora_limits.gradients import plan
from lora_limits.heads import polynomial_blocks, polynomial_full
from lora_limits.heads.tokens import pattern_of, tokens_of
from lora_limits.heads.visibility import Tokens, sees_any
from lora_limits.linalg import dot
from lora_limits.polynomial import monomials
from lora_limits.problem import Adapter, LoRAProblem, projections, pull_back, scalars

EXACT_BLOCKS = (128, 512)  # tokens to a block, at least and at most, whose scores are exact


class Centres(NamedTuple):
    """Of rows of queries and keys with sqrt(beta) in both."""

    nu: Float[Array, " d"]
    mu: Float[Array, " d"]
    v_mean: Float[Array, " dv"]
    w: Float[Array, " lk"]  # exp(nu . (K_j - mu)) over the largest; 0 for a key that is not there


class Rows(NamedTuple):
    """Queries and keys as the features are made of them, tokens last; values, centred."""

    x: Float[Array, "d lq"]
    y: Float[Array, "d lk"]
    v: Float[Array, "dv lk"]
    centres: Centres
    to_x: Float[Array, "d d"] | None  # the balance, where the series wants one
    to_y: Float[Array, "d d"] | None


class Outputs(NamedTuple):
    """What the forward leaves of every query."""

    total: Float[Array, " lq"]  # D_i; infinite where no other block counts
    normaliser: Float[Array, " lq"]  # D_i, scaled
    mean: Float[Array, "lq dv"]  # of the centred values
    residual: Float[Array, "lq dv"]  # c~_i, 0 for a query that is not there
    counts: Bool[Array, " lq"]  # whether it is there and sees something


class Solved(NamedTuple):
    """A gradient, and what is said of it."""

    loss: jax.Array
    gradient: dict[str, Adapter]
    normaliser: jax.Array  # the smallest row sum of the queries that there are
    rows: Rows
    outputs: Outputs


def rule_of(problem: LoRAProblem, method: Any) -> polynomial_blocks.Rule:
    """How the blocks of a causal or packed problem are summed."""
    block = block_size(problem, method)
    return polynomial_blocks.Rule(block, method.degree, is_causal=problem.causal)


def in_blocks(problem: LoRAProblem) -> bool:
    """Whether places decide who sees whom: blocks of tokens are then exact within themselves."""
    return problem.causal or problem.segments is not None


def check(problem: LoRAProblem, method: Any) -> None:
    """Raises ValueError, by name, for what a Polynomial cannot do."""
    if problem.segments is not None and method.degree % 2:
        expected = "an even one: of few keys an odd polynomial's sum may be negative"
        fail("degree with segments", method.degree, expected)
    if in_blocks(problem) and method.series != "taylor":
        name = "causal" if problem.causal else "segments"
        fail(f"series of a Polynomial with {name}", repr(method.series), "'taylor'")


def block_size(problem: LoRAProblem, method: Any) -> int:
    """Tokens to a block. One that is exact within itself has 128 at least where the degree is odd:
    of fewer keys its sum may be negative.
    """
    block = method.block_size or plan.block_size(problem, method.degree)
    if not in_blocks(problem):
        return block
    least, most = EXACT_BLOCKS
    return max(block, least if method.degree % 2 else 1) if method.block_size else min(block, most)


def _centres(
    q: Float[Array, "lq d"],
    k: Float[Array, "lk d"],
    v: Float[Array, "lk dv"],
    tokens: Tokens,
    centred: bool,
) -> Centres:
    """nu is shortened where weights would underflow: any nu gives the same f."""
    asked = tokens.query.astype(q.dtype)
    nu = dot(asked, q) / jnp.maximum(asked.sum(), 1) if centred else jnp.zeros_like(q[0])
    log_w = dot(k, nu)
    least, most = (float(z) for z in (jnp.finfo(q.dtype).min, jnp.finfo(q.dtype).max))
    top = jnp.max(log_w, where=tokens.key, initial=least)
    spread = top - jnp.min(log_w, where=tokens.key, initial=most)
    widest = -math.log(float(jnp.finfo(q.dtype).tiny)) / 4
    short = jnp.minimum(1, widest / jnp.maximum(spread, widest))
    log_w = jnp.where(tokens.key, short * (log_w - top), 0)
    w = jnp.where(tokens.key, jnp.exp(log_w), 0)
    shares = w / jnp.maximum(w.sum(), 1)
    mu = dot(shares, k) if centred else jnp.zeros_like(k[0])
    return Centres(short * nu, mu, dot(shares, v), w)


def rows_of(problem: LoRAProblem, method: Any) -> Rows:
    """Projected, turned, centred rows. O(L d_model d) time, O(L d) memory."""
    root = jnp.sqrt(scalars(problem)[1])
    q, k, v = projections(problem)
    q, k = root * q, root * k
    centres = _centres(q, k, v, tokens_of(problem), method.centred)
    x = (q - centres.nu[None]).T
    y = (k - centres.mu[None]).T
    to_x = to_y = None
    if method.series != "taylor":
        # Taylor's polynomial is the same in all coordinates; the range of the scores is bounded in
        # balanced ones.
        counted = tokens_of(problem).query.astype(x.dtype)[None]
        to_y, to_x = balance(dot(x * counted, x.T), dot(y * centres.w[None], y.T))
        x, y = dot(to_x, x), dot(to_y, y)
    return Rows(x, y, (v - centres.v_mean[None]).T, centres, to_x, to_y)


def solve(problem: LoRAProblem, method: Any) -> Solved:
    """Loss and gradient of a settled problem by a Polynomial method.

    Time O(L k (1 + d_value) + L d_model (d + r)), with a causal order or documents
    O(L block (d + d_value)) more for the scores of the blocks themselves; memory
    O(L (d + d_value) + k (1 + d_value) + block (k + block)).
    """
    tokens = tokens_of(problem)
    rule = rule_of(problem, method)
    rows = rows_of(problem, method)
    x, y, v, w = rows.x, rows.y, rows.v, rows.centres.w
    if in_blocks(problem):
        document = tokens.key_document
        out, kept, scale = polynomial_blocks.forward_with_scale(rule, x, y, w, v, document)
    else:
        c = polynomial_full.coefficients(method, x, y, tokens.query, w)
        out, kept = polynomial_full.forward(rule.block, None, c, x, y, w, v)
        scale = jnp.ones_like(out[0])
    normaliser, mean = kept[-2:]
    # A query that sees no key has no mean to get back, and the output 0; one whose row has
    # underflowed has no output.
    sees = sees_any(pattern_of(problem), tokens, tokens.key, x.shape[1])
    out = jnp.where((normaliser != 0)[:, None], out.T + rows.centres.v_mean[None], jnp.nan)
    out = jnp.where(sees[:, None], out, 0)
    c = jnp.where(tokens.query[:, None], out - problem.target, 0)
    # and no gradient flows through it
    back = jnp.where(sees[:, None], c, 0).T
    if in_blocks(problem):
        dx, dy, dlog_w, dv = polynomial_blocks.backward(rule, kept, back)
    else:
        _, dx, dy, dw, dv = polynomial_full.backward(rule.block, None, kept, back)
        dlog_w = dw * w
    gradient = _pulled_back(problem, rows, dx, dy, dlog_w, dv)
    counts = tokens.query & sees
    least = jnp.min(normaliser, where=counts, initial=jnp.inf)
    total = jnp.where(scale > 0, normaliser / jnp.where(scale > 0, scale, 1), jnp.inf)
    outputs = Outputs(total, normaliser, mean.T, c, counts)
    return Solved(0.5 * (c**2).sum(), gradient, least, rows, outputs)


def _pulled_back(problem: LoRAProblem, rows: Rows, dx, dy, dlog_w, dv) -> dict[str, Adapter]:
    """From the rows of the features to the adapters."""
    root = jnp.sqrt(scalars(problem)[1])
    centres = rows.centres
    if rows.to_x is not None and rows.to_y is not None:
        dx, dy = dot(rows.to_x.T, dx), dot(rows.to_y.T, dy)
    dk = dy.T + dlog_w[:, None] * centres.nu[None]
    # mu takes its share of every key along
    shares = centres.w / jnp.maximum(centres.w.sum(), 1)
    dk = dk - shares[:, None] * dk.sum(0, keepdims=True)
    found = {"query": root * dx.T, "key": root * dk, "value": dv.T}
    return {name: pull_back(problem, name, found[name]) for name in problem.adapters}


def features(problem: LoRAProblem, method: Any) -> int:
    """k = binom(d + g, g)."""
    return monomials.count(problem.weights.query.shape[1], method.degree)
