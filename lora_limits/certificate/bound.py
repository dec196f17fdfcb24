"""Certified max-norm bounds on the polynomial gradients, from row moments of the same features.

Notation, for one query i

    f~_ij = w_j P(s_ij) / D_i          the polynomial's row; P' stands for P in the gradient's kernel
    eps_j = w_j (e^s - P)(s_ij) / D_i  what P leaves out of the row, eps'_j the same for P'
    a     = sum_j eps_j                so that Z_i = sum_j w_j e^s = D_i (1 + a)
    m(z)  = sum_j f~_j z_j             the polynomial's mean of a column z; E_f[z] is the exact one
    v, k                               centred values, any column of keys; v^o = v - m(v)
    c~                                 the computed residual; q^o_j = c~ . v^o_j
    G~    = (1 / D_i) sum_j w_j P'(s_ij) q^o_j k_j      the computed row of the gradient
    G     = Cov_f(c . v, k)                             the exact one

The identity behind every bound, exact:

    (1 + a) G - G~ = eps'[q^o k] - eps[q^o] E_f[k] + eps[v^o] . Cov_f(v, k).                 (*)

[c = c~ + eps[v^o] / (1+a), E_f v = m(v) + eps[v^o] / (1+a), E_f[v^o] = eps[v^o] / (1+a); expand
and collect.]

From (*) to a number, in the order of the code:

    row_bounds   An envelope |e^s - P'| <= h0 + h1 |s|^g gives a measure eta' >= |eps'|, and eta
                 likewise for P with |s|^{g+1} <= R_i |s|^g, R_i >= max_j |s_ij|. With t the largest
                 even number <= g, |s|^g <= s^t (|x||y|)^{g-t}: even powers of s are themselves
                 features, so eta'[z] of a column z >= 0 is read from the degree-t features.
                 Centred keys give Z_i >= sum_j w_j (Jensen), so only D_i > 0 is needed; where it
                 cannot be certified the bound is infinite and the result says so.
    terms        Cauchy-Schwarz in each measure, with Z = N3 v, W = N3^-T v for an invertible N3:
                 every term of (*) is bounded by products of the roots of eta[1], eta[|Z|^2],
                 eta[|W|^2], eta[k^2] and E_f[z] <= (1/Z_i) sum_j w_j (P_{t-1} + phi_t(R) s^t) z_j.
    query, key,  The row's bound times what stands on the other side of the array, summed over
    value        queries: truncation linearly, rounding in squares.
    here         truncation + LAMBDA sqrt(sum of squares), the largest entry of each array.

Rounding is bounded by the probabilistic analysis of Higham and Mary (rounding.py): independent
errors of different queries add in squares, with failure probability below 2 n exp(-LAMBDA^2 / 2)
< 1e-10 under its model of rounding errors with mean zero. The absolute sums come from radial moments
sum_j w_j |y_j|^m z_j. The worst case over all roundings would be sqrt(n L) times larger and say
nothing in float32; the truncation part needs no model. Rounding of the keys is shared by all
queries, so squares are optimistic for it: the slack in LAMBDA covers that while sqrt(L) is small
beside LAMBDA n, tested to L = 2048 in float32 and not known to hold near 1e5 where rounding is
systematic. Centred columns can be made of cancellation, so their own rounding, which is in
proportion to |x||W| and not to what is left, is counted apart (floors.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate import key, query, terms, value
from lora_limits.certificate.columns import names
from lora_limits.certificate.rounding import LAMBDA
from lora_limits.certificate.row_bounds import Rows, by_name
from lora_limits.certificate.terms import Grounds, Visit
from lora_limits.problem import Adapter, LoRAProblem, scalars

# What each adapter adds up over queries, and how it ends: zero, add, finish of its module.
ADAPTERS: dict[str, Any] = {"query": query, "key": key, "value": value}
HALVES = ("a", "b")


class Sums(NamedTuple):
    """What the sweep over queries carries for the bound."""

    arrays: dict[str, dict[str, Any]]  # {adapter: {half: the named sums of its module}}
    certain: Float[Array, ""]  # the smallest certified D_i over the sum of the weights


def zero(problem: LoRAProblem) -> Sums:
    """The sums before the first query."""
    arrays = {name: ADAPTERS[name].zero(problem) for name in problem.adapters}
    return Sums(arrays, jnp.asarray(jnp.inf, problem.dtype))


def add(grounds: Grounds, sums: Sums, visit: Visit, rows: Rows) -> Sums:
    """Adds a block of queries: one Cauchy-Schwarz for each term of (*), rounding in squares."""
    at = by_name(rows, names(grounds.problem))
    shared = terms.make(grounds, visit, rows, at)
    arrays = dict(sums.arrays)
    if "query" in arrays:
        arrays["query"] = query.add(grounds, arrays["query"], visit, rows, at, shared)
    if "key" in arrays:
        arrays["key"] = key.add(grounds, arrays["key"], visit, rows, at, shared)
    if "value" in arrays:
        arrays["value"] = value.add(grounds, arrays["value"], visit, rows, at)
    certain = jnp.where(jnp.isnan(rows.certain), -jnp.inf, rows.certain)
    certain = jnp.where(visit.live > 0, certain, jnp.inf)
    return Sums(arrays, jnp.minimum(sums.certain, certain.min()))


def finish(grounds: Grounds, sums: Sums, devices: int = 1) -> dict[str, Adapter]:
    """The certified max-norm error of every array: {name: Adapter(a=scalar, b=scalar)}.

    sums: over the queries of all `devices`.
    """
    problem = grounds.problem
    tokens = devices * (problem.x_query.shape[0] + problem.x_key.shape[0])
    return {
        name: Adapter(*(_largest(grounds, sums, name, half, tokens) for half in HALVES))
        for name in problem.adapters
    }


def _largest(grounds: Grounds, sums: Sums, name: str, half: str, tokens: int) -> Array:
    """The bound of one array: its largest entry."""
    problem = grounds.problem
    scale, beta = scalars(problem)
    worst, squares = ADAPTERS[name].finish(grounds, half, sums.arrays[name][half])
    # what squares and weights lose when they underflow
    sigma = grounds.columns.sigma[f"{name}.{half}"].max()
    lost = tokens * LAMBDA * jnp.finfo(problem.dtype).tiny ** 0.5 * (1 + beta) * (1 + sigma)
    bound = jnp.abs(scale) * (jnp.max(worst + LAMBDA * jnp.sqrt(squares)) + lost)
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)
