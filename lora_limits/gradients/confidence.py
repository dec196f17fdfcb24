"""The second promise: a bound that holds with probability 1 - delta over the library's own draws.

The truncation error of every array is a sum over queries, e = sum_i E_i. The certificate bounds
every |E_i|, drawn or not: r_i. Rows are drawn with probabilities pi in proportion to r, all arrays
considered, fixed before the draw, and X_s = E_{i_s} / pi_{i_s}, computed exactly from its row, has
the mean e. Then |X| <= M = max_i r_i / pi_i always, and the empirical Bernstein bound of betting.py
holds whatever the problem is. Rounding, which sampling does not see, is certified and added.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.bound import Parts, arrays_of, known
from lora_limits.estimate import coin
from lora_limits.estimate.betting import mean_bound
from lora_limits.estimate.rows import Terms
from lora_limits.linalg import largest
from lora_limits.method import Sampling
from lora_limits.problem import Adapter, LoRAProblem

# A drawn row is computed by the polynomial and exactly, and subtracted: each is rounded alike.
COMPUTED = 3


def chances(each: Float[Array, "arrays lq"], sizes: Float[Array, " arrays"]) -> Float[Array, " lq"]:
    """pi: in proportion to each query's largest share in the bounds, each array beside its size.

    No other probabilities make the largest range, max_i r_i / pi_i over the size of its array, less.
    """
    share = (each / sizes[:, None]).max(0)
    whole = share.sum()
    usable = jnp.isfinite(whole) & (whole > 0)
    return jnp.where(usable, share / jnp.where(usable, whole, 1), 1 / each.shape[1])


def confident(
    problem: LoRAProblem,
    parts: dict[str, Adapter],
    truncation: Float[Array, "arrays lq"],
    lost: Float[Array, "arrays lq"],
    gradient: dict[str, Adapter],
    sampling: Sampling,
    terms_of: Callable[[jax.Array], dict[str, Adapter]],
) -> dict[str, Adapter]:
    """{name: Adapter of scalars}: each at least the max-norm error, all at once, but with delta.

    parts, truncation: of the certificate, r_i the second. lost: rounding of the share of a query as
    `terms_of` computes it, which gives the Terms of the shares E_i of the queries that are drawn.
    O(arrays Lq) memory beside them.
    """
    arrays = arrays_of(problem)
    # what matters of an array is its bound beside its largest entry
    sizes = jnp.stack([jnp.abs(getattr(gradient[name], half)).max() for name, half in arrays])
    of = coin.make(chances(truncation, jnp.where(sizes > 0, sizes, 1)))
    pi = of.chances
    index = coin.draw(sampling.key, of, sampling.rows)
    weights = 1 / pi[index]
    terms = terms_of(index)
    entries = sum(x.size for x in jax.tree.leaves(problem.adapters))
    log_chances = math.log(2 * entries / sampling.delta)

    def bound(place: int, part: Parts, rows: Terms) -> Float[Array, ""]:
        most = largest(truncation[place] / pi)
        seen = mean_bound(rows, weights, most, lost[place][index] * weights, log_chances)
        truncated = jnp.fmin(seen, part.truncation)
        return known(largest(truncated + part.rounding) + part.rest)

    found = {
        (name, half): bound(i, getattr(parts[name], half), getattr(terms[name], half))
        for i, (name, half) in enumerate(arrays)
    }
    return {name: Adapter(found[name, "a"], found[name, "b"]) for name in problem.adapters}
