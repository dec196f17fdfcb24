"""What the error of a gradient through a masked factor is estimated to be, from exact rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.estimate import masked_rows
from lora_limits.estimate.intervals import check_sampling, draw, half_uniform, interval_of
from lora_limits.estimate.relative import relative_of
from lora_limits.factors.factor import rows_of
from lora_limits.factors.masked import Found, Made
from lora_limits.heads.tokens import sees_of, tokens_of
from lora_limits.linalg import row_norms
from lora_limits.method import Sampling
from lora_limits.problem import Adapter, LoRAProblem, projections, scalars

LEVEL = 0.95


def head_of(problem: LoRAProblem) -> masked_rows.Head:
    """The rows of a problem, nothing centred: the exact row needs no weights then."""
    root = jnp.sqrt(scalars(problem)[1])
    q, k, v = projections(problem)
    tokens = tokens_of(problem)
    nothing = jnp.zeros_like
    return masked_rows.Head(
        root * q,
        root * k,
        v,
        nothing(v[0]),
        nothing(k[0]),
        tokens.key.astype(q.dtype),
        tokens.query,
    )


def estimate(
    problem: LoRAProblem, made: Made, found: Found, sampling: Sampling
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """(Estimate, relative error) of every array, as relative.from_rows has them.

    Rows are drawn half uniformly, half in proportion to |c~_i| times the method's indicator.
    """
    check_sampling(sampling.rows, LEVEL)
    head, sees = head_of(problem), sees_of(problem)
    size = row_norms(found.c) * (1 if made.indicator is None else made.indicator)
    pi = half_uniform(jnp.where(jnp.isfinite(size), size, 0))
    index = draw(sampling.key, pi, sampling.rows)

    def kernel(s, seen, i):
        del s, seen
        row = rows_of(made.factor, i[None])[0]
        return row, row

    def errors(index):
        return masked_rows.row_errors(problem, head, sees, kernel, index)

    certain = jax.lax.top_k(pi, min(max(sampling.rows // 4, 1), pi.shape[0]))[1]
    drawn, known = errors(index), errors(certain)
    weights = (1 / pi[index])[:, None, None]
    others = (index[:, None] != certain[None]).all(1)[:, None, None]

    def relative(drawn: Float[Array, "m n1 n2"], known: Array, got: Array) -> Array:
        return relative_of(jnp.where(others, weights * drawn, 0), known.sum(0), got)

    estimates = jax.tree.map(lambda e: interval_of(weights * e, LEVEL), drawn)
    return estimates, jax.tree.map(relative, drawn, known, found.gradient)
