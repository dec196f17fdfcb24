"""The paper's own algorithm, Lemmas 3.3 to 3.7 (D.5 to D.9) as corrected, with every factor formed
explicitly.

    f ~ U1 V1^T        any factor of f, rows normalised; k1 columns                                     (Lemma 3.3)
    c ~ U1 (V1^T V) - Y                                                                                 (Lemma 3.4)
    q ~ U2 V2^T        U2 = c~, V2 = V: k2 = d_value columns, not 2 d                                   (Lemma 3.5)
    p1 ~ U3 V3^T       U3, V3 the row-wise Kronecker products of U1, U2 and of V1, V2: k1 k2 columns    (Lemma 3.6)
    p2 ~ U4 V4^T       U4 = diag(rho~) U1, V4 = V1                                                      (Lemma 3.7)
    dl/dQ = beta (U3 (V3^T K) - U4 (V4^T K)),  dl/dK = beta (V3 (U3^T Q) - V4 (U4^T Q)),  dl/dV = V1 (U1^T c~)

Both p1 and p2 come from the same f~ whose rows sum to 1, so p~ 1 = 0 exactly and K may be centred.
The fast gradient differentiates the factored forward instead. With P_g in place of exp, D_g its row
sums, mu and nu the centres:

    fast(g + 1):  h = diag(D_g / D_{g+1}) f~_g,  p^ = h o (q~_{g+1} - rho~_{g+1} 1^T)
                  dl/dQ = beta p^ (K - 1 mu^T),  dl/dW_K = beta (X_K - 1 m^T)^T (p^^T (Q - 1 nu^T) + p~_{g+1}^T 1 nu^T)
    chain(g):     p~ = f~_g o (q~_g - rho~_g 1^T)

for Taylor, m the mean of X_K behind mu: residual and mean are one degree higher, and but for the
diagonal the kernel is the chain's. p^ 1 is not 0, so the centres matter there.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.certificate import row_bounds
from lora_limits.coordinates import frame as frames
from lora_limits.gradients import exact
from lora_limits.linalg import dot
from lora_limits.polynomial import monomials
from lora_limits.polynomial import series as polynomial
from lora_limits.problem import NAMES, Adapter, LoRAProblem, inputs, projections, pull_back, scalars

BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Chain:
    """The paper's chain on a polynomial factor of f: k1 = binom(d + degree, degree), and U3, V3 of
    k1 d_value columns.

    O(L k1 d_value d) time and O(L k1 d_value) memory, a factor of about d above `Polynomial`, and
    no certificate: it is there to be compared with. series as in `Polynomial`, here for P itself.
    An odd degree or a series other than Taylor may have row sums that are not positive; the result
    is then worthless, and nothing says so. Raises ValueError for a degree that is not an integer of
    at least 0 or an unknown series.
    """

    degree: int
    series: str = "taylor"

    def __post_init__(self):
        if isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 0:
            raise ValueError(
                f"Chain degree: got {self.degree!r}, expected an integer of at least 0"
            )
        if self.series not in polynomial.SERIES:
            raise ValueError(
                f"Chain series: got {self.series!r}, expected one of {list(polynomial.SERIES)}"
            )


class ChainTerms(NamedTuple):
    """Every intermediate as a factor: f~ = u1 v1^T, c~, q~ = u2 v2^T, rho~, p1~ = u3 v3^T, p2~ = u4
    v4^T.
    """

    u1: jax.Array  # (Lq, k1), rows of u1 v1^T sum to 1
    v1: jax.Array  # (Lk, k1)
    c: jax.Array  # (Lq, d_value)
    u2: jax.Array  # (Lq, d_value)
    v2: jax.Array  # (Lk, d_value)
    rho: jax.Array  # (Lq,)
    u3: jax.Array  # (Lq, k1 d_value)
    v3: jax.Array  # (Lk, k1 d_value)
    u4: jax.Array  # (Lq, k1)
    v4: jax.Array  # (Lk, k1)


def row_kronecker(a: jax.Array, b: jax.Array) -> jax.Array:
    """Row j is a_j kron b_j, so that (A B^T) o (C D^T) = row_kronecker(A, C) row_kronecker(B, D)^T.
    (L, m n).
    """
    return (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)


def chain_terms(problem: LoRAProblem, u1: jax.Array, v1: jax.Array) -> ChainTerms:
    """Lemmas 3.4 to 3.7 from any factor of f: u1 (Lq, k1), v1 (Lk, k1). O(L k1 d_value) time and
    memory.

    Rows of u1 are divided by the row sums of u1 v1^T first; these must not be 0.
    """
    v = projections(problem)[2]
    u1 = u1 / dot(u1, v1.sum(0)[:, None])
    out = dot(u1, dot(v1.T, v))
    c = out - problem.target
    rho = (c * out).sum(-1)
    return ChainTerms(
        u1, v1, c, c, v, rho, row_kronecker(u1, c), row_kronecker(v1, v), rho[:, None] * u1, v1
    )


def _gradient(problem: LoRAProblem, t: ChainTerms) -> dict[str, Adapter]:
    q, k, _ = projections(problem)
    k = k - k.mean(0, keepdims=True)  # p~ 1 = 0: the same gradient, less cancellation
    beta = scalars(problem)[1]
    rows = {
        "query": lambda: beta * (dot(t.u3, dot(t.v3.T, k)) - dot(t.u4, dot(t.v4.T, k))),
        "key": lambda: beta * (dot(t.v3, dot(t.u3.T, q)) - dot(t.v4, dot(t.u4.T, q))),
        "value": lambda: dot(t.v1, dot(t.u1.T, t.c)),
    }
    return {name: pull_back(problem, name, rows[name]()) for name in problem.adapters}


def chain_gradient(
    problem: LoRAProblem, u1: jax.Array, v1: jax.Array
) -> tuple[jax.Array, dict[str, Adapter]]:
    """(loss, adapter gradients) of Theorems 3.1 and A.1 from any factor of f, as `chain_terms`
    takes it.

    O(L k1 d_value d) time, O(L k1 d_value) memory.
    """
    terms = chain_terms(problem, u1, v1)
    return 0.5 * (terms.c**2).sum(), _gradient(problem, terms)


def polynomial_factor(
    problem: LoRAProblem, degree: int, series: str = "taylor"
) -> tuple[jax.Array, jax.Array]:
    """(U1, V1) with U1 V1^T = D^-1 P(S) diag(w), scores centred as in `frame`: (Lq, k1), (Lk, k1),
    rows sum to 1.

    P of the given degree is Taylor's, the Chebyshev series of exp on [-R, R], or a fit to a sample
    of scores: the derivative of what `Polynomial` takes one degree higher. O(L k1) time beside the
    projections.
    """
    frame = frames.make(problem, BLOCK, centred=True)
    q, k, _ = projections(problem)
    x = dot(frame.to_x, (q - frame.nu[None]).T)
    y = dot(frame.to_y, (k - frame.mu[None]).T)
    w = jnp.exp(scalars(problem)[1] * dot(k, frame.nu) - frame.shift)
    reach = jnp.sqrt((y**2).sum(0)).max()
    box = jnp.abs(y).max(1)
    radius = jnp.maximum(row_bounds.row_range(x, reach, box).max(), 0.05)
    few = frames.sample_rows(x.T, 64)
    s = jnp.clip(dot(few, y), -radius, radius).reshape(-1)
    sample = (s, jnp.tile(w, few.shape[0]) + jnp.finfo(w.dtype).tiny)
    c = polynomial.derivative(polynomial.coefficients(series, degree + 1, radius, sample))
    order, multinomial = monomials.tables(x.shape[0], degree)
    coefficient = c[order.astype(int)] * jnp.asarray(multinomial, w.dtype)
    u1 = (monomials.features(x, degree) * coefficient[:, None]).T
    v1 = monomials.features(y, degree).T * w[:, None]
    return u1 / dot(u1, v1.sum(0)[:, None]), v1


def run(problem: LoRAProblem, method: Chain) -> tuple[jax.Array, dict[str, Adapter], int]:
    """(loss, adapter gradients, k1) of a Chain method."""
    u1, v1 = polynomial_factor(problem, method.degree, method.series)
    return *chain_gradient(problem, u1, v1), u1.shape[1]


def _half_range(x: jax.Array) -> jax.Array:
    return (x.max(0) - x.min(0)) / 2


def _row_bounds(
    problem: LoRAProblem, t: ChainTerms, f: jax.Array, delta: jax.Array
) -> dict[str, jax.Array]:
    """Bounds on each term, (Lq,) or (Lq, d_value), from delta and computed quantities; "row": the
    row-l1 one of p.
    """
    v = t.v2
    h = _half_range(v)[None]
    hq = (jnp.abs(t.c) * h).sum(1)
    total = (h**2).sum()
    out = jnp.abs(t.c + problem.target)
    top = jnp.abs(f).max(1)
    dq = delta * (jnp.abs(v) * h).sum(1).max()
    drho = delta * (hq + (h * (out + delta[:, None] * h)).sum(1))
    peak = jnp.minimum(top + delta / 2, 1)
    return {
        "f": delta / 2,
        "c": delta[:, None] * h,
        "q": dq,
        "p1": delta / 2 * jnp.abs(dot(t.u2, v.T)).max(1) + peak * dq,
        "p2": drho * top + (jnp.abs(t.rho) + drho) * delta / 2,
        "p": delta / 2 * (2 + delta) * hq + peak * delta * (2 * total + hq),
        "row": delta * ((3 + delta) * hq + 2 * total),
    }


def _adapter_bounds(
    problem: LoRAProblem, t: ChainTerms, delta: jax.Array, row: jax.Array
) -> dict[str, Adapter]:
    """Bounds on every entry of dA (r, d) and dB (d_model, r); see `chain_errors`."""
    (scale, beta), x = scalars(problem), inputs(problem)
    q, k, v = projections(problem)

    def pair(name: str, a: Adapter) -> tuple[jax.Array, ...]:
        """The columns that meet p on the left and on the right, for dA and for dB."""
        y = {"query": k, "key": q, "value": v}[name]
        return dot(x[name], a.b), y, x[name], dot(y, a.a.T)

    def bound(name: str, left: jax.Array, right: jax.Array) -> jax.Array:
        if name == "query":
            return (
                jnp.abs(scale)
                * beta
                * dot(jnp.abs(left).T, row[:, None])
                * _half_range(right)[None]
            )
        if name == "key":
            return (
                jnp.abs(scale) * beta * _half_range(left)[:, None] * dot(row[None], jnp.abs(right))
            )
        c = t.c if right is v else dot(t.c, problem.adapters[name].a.T)
        dz = delta[:, None] * _half_range(left)[None]
        z = jnp.abs(dot(t.u1, dot(t.v1.T, left))) + dz
        return jnp.abs(scale) * (
            dot(dz.T, jnp.abs(c)) + dot(z.T, delta[:, None] * _half_range(right)[None])
        )

    out = {}
    for name, a in problem.adapters.items():
        left_a, right_a, left_b, right_b = pair(name, a)
        out[name] = Adapter(bound(name, left_a, right_a), bound(name, left_b, right_b))
    return out


def chain_errors(
    problem: LoRAProblem, u1: jax.Array, v1: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{term: (max-norm error, bound)} for f, c, q, p1, p2, p and "query.a", "query.b", ...: the
    lemmas with constants.

    With delta_i = sum_j |f~_ij - f_ij| (computed densely here: this is an experiment), h_k = half
    the range of column k of V, H = sum_k h_k^2, hq_i = sum_k |c~_ik| h_k, F_i = min(1, max_j
    |f~_ij| + delta_i / 2) >= max_j f_ij:

        3.4   |dc_ik| <= delta_i h_k                              (|df_ij| <= delta_i / 2, as both rows sum to 1)
        3.5   |dq_ij| <= delta_i max_j sum_k h_k |V_jk| =: Q_i
        3.6   |dp1_ij| <= (delta_i / 2) max_j |q~_ij| + F_i Q_i                            [p1~ - p1 = df o q~ + f o dq]
        3.7   |drho_i| <= delta_i (hq_i + sum_k h_k (|(f~ V)_ik| + delta_i h_k)) =: r_i
              |dp2_ij| <= r_i max_j |f~_ij| + (|rho~_i| + r_i) delta_i / 2
        p     |dp_ij| <= (delta_i / 2)(2 + delta_i) hq_i + F_i delta_i (2 H + hq_i)
              sum_j |dp_ij| <= E_i = delta_i ((3 + delta_i) hq_i + 2 H)
        dA_Q  |.|_ab <= s beta hr(K_b) sum_i |(X_Q B)_ia| E_i             dB_Q: K A^T for K, X_Q for X_Q B
        dA_K  |.|_ab <= s beta hr((X_K B)_a) sum_i |Q_ib| E_i             dB_K: X_K for X_K B, Q A^T for Q
        dA_V  |.|_ab <= s sum_i d_ia |c~_ib| + (|(f~ X_V B)_ia| + d_ia) delta_i h_b,  d_ia = delta_i hr((X_V B)_a)

    Rounding is not included. O(Lq Lk (k1 + d)) time, O(Lq Lk + L k1 d_value) memory.
    """
    t = chain_terms(problem, u1, v1)
    true = exact.dense_terms(problem)
    f = dot(t.u1, t.v1.T)
    p1 = dot(t.u3, t.v3.T)
    p2 = dot(t.u4, t.v4.T)
    got = {"f": f, "c": t.c, "q": dot(t.u2, t.v2.T), "p1": p1, "p2": p2, "p": p1 - p2}
    delta = jnp.abs(f - true["f"]).sum(1)
    bounds = _row_bounds(problem, t, f, delta)
    out = {name: (jnp.abs(x - true[name]).max(), bounds[name].max()) for name, x in got.items()}
    arrays = _gradient(problem, t)
    right = exact.dense_gradient(problem)[1]
    limits = _adapter_bounds(problem, t, delta, bounds["row"])
    for name in (n for n in NAMES if n in arrays):
        for half in ("a", "b"):
            x, y, limit = (getattr(table[name], half) for table in (arrays, right, limits))
            out[f"{name}.{half}"] = (jnp.abs(x - y).max(), limit.max())
    return out
