"""Certified max-norm bounds on the polynomial gradients, from row moments of the same features.

What is promised: a finite bound is never below the error, rounding included, whatever the input.
Deterministic, worst case, under the arithmetic of rounding.py; in double precision.

Notation, for one query i

    f~_ij = w_j P(s_ij) / D_i          the polynomial's row; P' stands for P in the gradient's kernel
    eps_j = w_j (e^s - P)(s_ij) / D_i  what P leaves out of the row, eps'_j the same for P'
    a     = sum_j eps_j                so that Z_i = sum_j w_j e^s = D_i (1 + a)
    m(z)  = sum_j f~_j z_j             the polynomial's mean of a column z; E_f[z] is the exact one
    v, k                               values, any column of keys, shifted; v^o = v - m(v)
    c~                                 m(v) + v_mean - Y; q^o_j = c~ . v^o_j
    G~    = (1 / D_i) sum_j w_j P'(s_ij) q^o_j k_j      the row of the polynomial's gradient
    G     = Cov_f(c . v, k)                             the exact one

The identity behind every bound, exact, whatever v and k were shifted by:

    (1 + a) G - G~ = eps'[q^o k] - eps[q^o] E_f[k] + eps[v^o] . Cov_f(v, k).                 (*)

[c = c~ + eps[v^o] / (1+a), E_f v = m(v) + eps[v^o] / (1+a), E_f[v^o] = eps[v^o] / (1+a); expand
and collect.]

From (*) to a number, in the order of the code:

    row_bounds   An envelope |e^s - P'| <= h0 + h1 |s|^g gives a measure eta' >= |eps'|, and eta
                 likewise for P with |s|^{g+1} <= R_i |s|^g, R_i >= max_j |s_ij|. With t the largest
                 even number <= g, |s|^g <= s^t (|x||y|)^{g-t}: even powers of s are themselves
                 features, so eta'[z] of a column z >= 0 is read from the degree-t features.
                 Z_i >= sum_j w_j exp(x_i . y) with y the weighted mean of the keys (Jensen): it is
                 computed, as is that of every column, and nothing rests on its being 0. So only
                 D_i > 0 is needed; where it cannot be certified the bound is infinite.
    terms        Cauchy-Schwarz in each measure, with Z = N3 v, W = N3^-T v for an invertible N3:
                 every term of (*) is bounded by products of the roots of eta[1], eta[|Z|^2],
                 eta[|W|^2], eta[k^2] and E_f[z] <= (1/Z_i) sum_j w_j (P_{t-1} + phi_t(R) s^t) z_j.
    query, key,  The row's bound times what stands on the other side of the array, summed over
    value        queries, truncation and rounding apart.
    here         truncation + rounding, the largest entry of each array.

Rounding. The scores s^ and weights w^ that the sweeps compute define a softmax f^ of their own;
(*) is used for f^ with the true columns. What is left is of first order, each with its line:

    floors       f against f^: what rounded queries, keys, weights, balancing move each score by;
                 what each column's entries are rounded by, on the way to y and back, and what is
                 lost of it to squares that underflow (`row_bounds.by_name` adds that to every
                 bound of the column)
    terms        sums over keys and features: gamma times absolute sums, from radial moments
                 sum_j w_j |y_j|^m z_j, and |c~||v_j| for c~ . v_j, which may be far less; D_i, by
                 gamma sum_j |w_j P(s_ij)|; c~, through N3; f^ in place of f, in G and in c
    query, key,  rounding of u_i or Q_i; products after the row; sums over queries
    value

and what makes all of this void makes the bound infinite: scores rounded by more than 1/100, weights
near underflow, a gamma that is not small, an N3^-1 that is not the inverse of N3 (`_sound`), a D_i
near 0 or rounded by more than 1/1000 (`row_bounds.rows`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.certificate import key, query, terms, value
from lora_limits.certificate.columns import names
from lora_limits.certificate.floors import LIGHTEST
from lora_limits.certificate.rounding import SECOND, column_lengths, frobenius, unit_roundoff
from lora_limits.certificate.row_bounds import FIRST_ORDER, OUTWARD, Rows, by_name
from lora_limits.certificate.terms import Grounds, Visit
from lora_limits.linalg import dot, largest
from lora_limits.problem import Adapter, LoRAProblem, scalars

SCORE = 0.01  # the most that a score may be rounded by
# What each adapter adds up over queries, and how it ends: zero, add, finish of its module.
ADAPTERS: dict[str, Any] = {"query": query, "key": key, "value": value}
HALVES = ("a", "b")


class Sums(NamedTuple):
    """What the sweep over queries carries for the bound."""

    adapters: dict[str, Any]  # {adapter: the named sums of its module}
    certain: Float[Array, ""]  # the smallest certified D_i over the sum of the weights
    score: Float[Array, ""]  # the most that a score is rounded by
    largest: Float[Array, ""]  # of what the queries brought: inputs, targets, coordinates


class PerQuery(NamedTuple):
    """What each query may add to the error of each array, its largest entry; by `arrays_of`."""

    truncation: Float[Array, "arrays n"]
    rounding: Float[Array, "arrays n"]


def arrays_of(problem: LoRAProblem) -> tuple[tuple[str, str], ...]:
    """The gradient arrays, (adapter, half), in order."""
    return tuple((name, half) for name in problem.adapters for half in HALVES)


def zero(problem: LoRAProblem) -> Sums:
    """The sums before the first query."""
    adapters = {name: ADAPTERS[name].zero(problem) for name in problem.adapters}
    nothing = jnp.zeros((), problem.dtype)
    return Sums(adapters, jnp.asarray(jnp.inf, problem.dtype), nothing, nothing)


def add(grounds: Grounds, sums: Sums, visit: Visit, rows: Rows) -> tuple[Sums, PerQuery]:
    """Adds a block of queries: one Cauchy-Schwarz for each term of (*)."""
    problem = grounds.problem
    at = by_name(rows, names(problem), column_floors(grounds))
    shared = terms.make(grounds, visit, rows, at)
    found = {n: ADAPTERS[n].shares(grounds, visit, rows, at, shared) for n in problem.adapters}
    # a query with c = 0 and no certified normaliser gives 0 * inf: that is not certified
    found = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), found)
    brought = {name: share.sums for name, share in found.items()}
    per_query = PerQuery(
        jnp.concatenate([share.truncation for share in found.values()]),
        jnp.concatenate([share.rounding for share in found.values()]),
    )
    certain = jnp.where(jnp.isnan(rows.certain), -jnp.inf, rows.certain)
    certain = jnp.where(visit.live > 0, certain, jnp.inf)
    sizes = visit.rounded.length, visit.scale_y, column_lengths(visit.x)
    new = Sums(
        jax.tree.map(jnp.add, sums.adapters, brought),
        jnp.minimum(sums.certain, certain.min()),
        jnp.maximum(sums.score, visit.rounded.score.max()),
        jnp.maximum(sums.largest, jnp.concatenate(sizes).max()),
    )
    return new, per_query


def column_floors(grounds: Grounds) -> dict[str, Array]:
    """Rounding of an entry of every column but "one", in units of its sigma; squares that underflow."""
    floors, columns = grounds.floors, grounds.columns
    entries = floors.columns | {
        "Z": frobenius(columns.n3) * floors.value,
        "W": frobenius(columns.n3_inverse) * floors.value,
    }
    return {name: floor + floors.lost for name, floor in entries.items()}


class Parts(NamedTuple):
    """What bounds the error of one array, entry by entry; everything rounded outward."""

    truncation: Array  # of the polynomial
    rounding: Array  # of the arithmetic
    rest: Float[Array, ""]  # the last products, underflow; infinite where nothing is promised

    def certified(self) -> Float[Array, ""]:
        """The bound of the array: its largest entry."""
        return known(largest(self.truncation + self.rounding) + self.rest)


def known(bound: Float[Array, ""]) -> Float[Array, ""]:
    """The bound; infinite where it came out as no number, which is to say that nothing is known."""
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def finish(
    grounds: Grounds,
    sums: Sums,
    gradient: dict[str, Adapter],
    parts: int = 1,
) -> dict[str, Adapter]:
    """{name: Adapter(a=Parts, b=Parts)}, from the sums over the queries of all `parts`.

    gradient: what is certified.
    """
    sound = _sound(grounds, sums)
    lost = _lost(grounds, sums, parts)
    out = {}
    for name in grounds.problem.adapters:
        pair = []
        for half, (worst, rounding) in ADAPTERS[name].finish(grounds, sums.adapters[name]).items():
            # the last products, by the scale
            size = largest(jnp.abs(getattr(gradient[name], half)))
            own = 4 * unit_roundoff(grounds.problem) * size
            rest = known(jnp.where(sound, own + lost, jnp.inf))
            pair.append(Parts(*outward(grounds.problem, worst, rounding), rest))
        out[name] = Adapter(*pair)
    return out


def bounds_of(parts: dict[str, Adapter]) -> dict[str, Adapter]:
    """The bounds of the arrays, from `bound.finish`."""
    return {n: Adapter(x.a.certified(), x.b.certified()) for n, x in parts.items()}


def with_distance(
    bounds: dict[str, Adapter], narrow: dict[str, Adapter], wide: dict[str, Adapter]
) -> dict[str, Adapter]:
    """Bounds on `narrow`, a gradient in less than double precision, from those on `wide`, the same
    in double precision. With 64 bits switched on.
    """

    def added(bound, x, y):
        total = known(bound + largest(jnp.abs(x.astype(jnp.float64) - y)))
        # outward, where it is rounded to the precision of the problem, or x or it to 0
        info = jnp.finfo(x.dtype)
        return (total * (1 + 2 * float(info.eps)) + float(info.tiny)).astype(x.dtype)

    return jax.tree.map(added, bounds, narrow, wide)


def outward(problem: LoRAProblem, truncation: Array, rounding: Array) -> tuple[Array, Array]:
    """Both times the scale, and times what makes up for second order and for their own rounding."""
    scale = jnp.abs(scalars(problem)[0]) * OUTWARD
    return scale * truncation, scale * SECOND * rounding


def _sound(grounds: Grounds, sums: Sums) -> Bool[Array, ""]:
    """Whether the first-order analysis holds: nothing that it takes for small is not."""
    small = grounds.setup.gamma * grounds.floors.from_x < FIRST_ORDER
    # (N3^-T c) . (N3 v) stands for c . v
    columns = grounds.columns
    defect = dot(columns.n3.T, columns.n3_inverse) - jnp.eye(
        columns.n3.shape[0], dtype=columns.n3.dtype
    )
    sizes = frobenius(columns.n3) * frobenius(columns.n3_inverse)
    whitened = frobenius(defect) * sizes < (OUTWARD - 1) / 4
    scores = sums.score <= SCORE
    weights = grounds.moments.lightest >= math.exp(LIGHTEST)
    return small & whitened & scores & weights & (sums.certain > 1e-30)


def _lost(grounds: Grounds, sums: Sums, parts: int) -> Float[Array, ""]:
    """What operations that underflow may lose in all.

    Each loses at most the smallest normal number, and is then multiplied by no more than eight of
    the factors below and the features of one query and one key.
    """
    problem, frame, columns = grounds.problem, grounds.frame, grounds.columns
    scale, beta = (jnp.abs(x) for x in scalars(problem))
    matrices = [frame.to_x, frame.to_y, columns.n3, columns.n3_inverse, frame.nu, frame.xv_mean]
    matrices += jax.tree.leaves((problem.weights, problem.adapters))
    sizes = [frobenius(x) for x in matrices] + [scale, beta, 1 / beta, sums.largest, grounds.reach]
    largest = jnp.maximum(jnp.stack(sizes).max(), 1)
    features = ((1 + sums.largest) * (1 + grounds.moments.reach)) ** (2 * grounds.setup.degree)
    tokens = parts * (problem.x_query.shape[0] + problem.x_key.shape[0])
    operations = 1e6 * tokens / jnp.minimum(sums.certain, 1)
    return operations * float(jnp.finfo(problem.dtype).tiny) * largest**8 * features
