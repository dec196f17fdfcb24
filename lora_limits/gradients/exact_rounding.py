"""What rounding may do to the exact gradient: a worst case in double precision, and a distance.

With V, K, X_K, X_V the longest rows and c_i = f V - Y, a row of the query's gradient is a sum of
terms f_ij (c_i . v_j - rho_i) k_j of size 2 |c_i| V K at most in all. Sums of n terms are rounded
by gamma_n of that, and scores that are rounded by ds each change it by 2 ds a factor f: there are
three, and one more in c_i. Everything is bounded by norms, so that it costs O(L d).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.rounding import EXP_ULP, gamma, projection_size, unit_roundoff
from lora_limits.gradients.methods import Exact
from lora_limits.heads.tokens import settled
from lora_limits.linalg import frobenius, largest, row_norms
from lora_limits.problem import Adapter, LoRAProblem, scalars


class _Sizes(NamedTuple):
    """Norms of the rows of a problem: of every query, and the longest of the keys and values."""

    x_query: Float[Array, " lq"]
    query: Float[Array, " lq"]
    target: Float[Array, " lq"]
    x_key: Float[Array, ""]
    key: Float[Array, ""]
    x_value: Float[Array, ""]
    value: Float[Array, ""]


def _sizes(problem: LoRAProblem) -> _Sizes:
    x_query = row_norms(problem.x_query)
    x_key = row_norms(problem.x_key).max()
    x_value = row_norms(problem.x_value).max()
    return _Sizes(
        x_query,
        x_query * projection_size(problem, "query"),
        row_norms(problem.target),
        x_key,
        x_key * projection_size(problem, "key"),
        x_value,
        x_value * projection_size(problem, "value"),
    )


@jax.jit
def worst_case(problem: LoRAProblem) -> dict[str, Adapter]:
    """{name: Adapter of scalars}: at least the rounding of the exact gradient, dense or tiled."""
    size = _sizes(problem)
    scale, beta = (jnp.abs(x) for x in scalars(problem))
    d_in, d = problem.weights.query.shape
    dv = problem.weights.value.shape[1]
    tokens = problem.x_query.shape[0] + problem.x_key.shape[0]
    # a score: two projections, the product, exp and what is taken off before it
    # and two rotations, each an angle's cosine and sine with two products and a sum
    terms = 4 * (d_in + d) + (32 if problem.rotations is None else 64)
    of_score = 2 * beta * gamma(problem, terms) * size.query.max() * size.key
    of_score = of_score + (2 * EXP_ULP + 4) * unit_roundoff(problem)
    lost = 4 * gamma(problem, tokens + 4 * (d_in + d + dv) + 64) + 16 * of_score
    # |c_i| <= V + |Y_i|
    row = lost * 2 * (size.value + size.target) * size.value
    out = {}
    for name, adapter in problem.adapters.items():
        a, b = frobenius(adapter.a), frobenius(adapter.b)
        if name == "query":
            half_a = beta * b * (size.x_query * row).sum() * size.key
            half_b = beta * a * (size.x_query * row).sum() * size.key
        elif name == "key":
            half_a = beta * b * (size.query * row).sum() * size.x_key
            half_b = beta * a * (size.query * row).sum() * size.x_key
        else:
            of_mean = (lost * (size.value + size.target)).sum() * size.x_value
            half_a, half_b = 2 * b * of_mean, 2 * a * of_mean
        out[name] = Adapter(scale * half_a, scale * half_b)
    # more rounding than a quarter is not of first order
    return jax.tree.map(lambda x: jnp.where(lost < 0.25, x, jnp.inf), out)


def _wide(x: Any) -> jax.Array:
    """Numbers in double precision; masks and segments as they are."""
    x = jnp.asarray(x)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def rounding(problem: LoRAProblem, method: Exact) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """(what rounding may do to the exact gradient, the largest entry of each array): scalars.

    In double precision the worst case. In less, where no worst case says anything: the distance to
    the gradient of the same numbers in double precision, and the worst case of that. Costs one
    exact gradient, or two.
    """
    problem = settled(problem)
    solve = jax.jit(lambda p: method.solve(p).gradient)
    got = solve(problem)
    sizes = jax.tree.map(lambda x: largest(jnp.abs(x)), got)
    if jnp.finfo(problem.dtype).bits == 64:
        return worst_case(problem), sizes
    with jax.enable_x64(True):
        wide = jax.tree.map(_wide, problem)
        true = solve(wide)
        lost = jax.tree.map(
            lambda x, y, least: largest(jnp.abs(x.astype(jnp.float64) - y)) + least,
            got,
            true,
            worst_case(wide),
        )
    return lost, sizes
