"""Who sees whom in a problem, and the problem without the tokens that do not count."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.heads.visibility import Pattern, Tokens, runs, visible
from lora_limits.problem import LoRAProblem, replaced
from lora_limits.rotary import Rotations


def pattern_of(problem: LoRAProblem) -> Pattern:
    """What is known of who sees whom before anything runs."""
    window = None if problem.window is None else (problem.window - 1, 0)
    packed = problem.segments is not None
    return Pattern(is_causal=problem.causal, window=window, packed=packed)


def tokens_of(problem: LoRAProblem) -> Tokens:
    """Which tokens there are, and the run of equal segments that each lies in."""
    lq, lk = problem.x_query.shape[0], problem.x_key.shape[0]
    asked = jnp.ones(lq, bool) if problem.query_mask is None else jnp.asarray(problem.query_mask)
    exists = jnp.ones(lk, bool) if problem.key_mask is None else jnp.asarray(problem.key_mask)
    if problem.segments is None:
        return Tokens(asked, exists)
    new = problem.segments[1:] != problem.segments[:-1]
    run = jnp.cumsum(jnp.pad(new, (1, 0)), dtype=jnp.int32)
    return Tokens(asked, exists, run, run)


def sees_of(problem: LoRAProblem) -> Callable[[jax.Array], jax.Array]:
    """Query -> which keys it sees."""
    pattern, tokens = pattern_of(problem), tokens_of(problem)
    at = jnp.arange(problem.x_key.shape[0], dtype=jnp.int32)

    def sees(i):
        own = tokens.query_document
        own = None if own is None else own[i][None]
        return visible(pattern, i[None], at, tokens.key, own, tokens.key_document)[0]

    return sees


def settled(problem: LoRAProblem) -> LoRAProblem:
    """The problem with zeros for the tokens that do not count, and masks that say so.

    Those are queries that are not there, and keys that are not or that no query which is there
    sees: whatever they held, NaN too, the gradient is the same, bit for bit. The problem itself
    where it has no masks, as every query then counts and sees the key of its own token. O(L d_model).
    """
    if problem.query_mask is None and problem.key_mask is None:
        return problem
    tokens = tokens_of(problem)
    seen = tokens.key & seen_by_any(pattern_of(problem), tokens)

    def kept(counts: Bool[Array, " n"], x: Float[Array, "n c"]) -> Float[Array, "n c"]:
        return jnp.where(counts[:, None], x, 0)

    rotations = problem.rotations
    if rotations is not None:
        rotations = Rotations(kept(tokens.query, rotations.query), kept(seen, rotations.key))
    return replaced(
        problem,
        x_query=kept(tokens.query, problem.x_query),
        x_key=kept(seen, problem.x_key),
        x_value=kept(seen, problem.x_value),
        target=kept(tokens.query, problem.target),
        rotations=rotations,
        query_mask=tokens.query,
        key_mask=seen,
    )


def seen_by_any(pattern: Pattern, tokens: Tokens) -> Bool[Array, " s"]:
    """Whether some query that is there may see each key, by position and by document. O(t + s).

    Where positions or documents decide, the nearest such query on either side decides for all.
    """
    length = tokens.key.shape[0]
    if not pattern.is_local and tokens.query_document is None:
        return jnp.broadcast_to(tokens.query.any(), (length,))
    at = jnp.arange(length, dtype=jnp.int32)
    first, last = jnp.zeros_like(at), jnp.full_like(at, length - 1)
    if tokens.query_document is not None:
        first, last = runs(tokens.query_document)
    if pattern.is_causal:
        first = at
    if pattern.window is not None:
        last = jnp.minimum(last, at + min(pattern.window[0], length))
    after = jnp.where(tokens.query, at, length)
    # the first query that is there at or behind `first`
    after = jax.lax.cummin(after, reverse=True)[first]
    return after <= last
