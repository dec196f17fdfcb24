"""The paper's own algorithm, Lemmas 3.3 to 3.7 (D.5 to D.9) as corrected, every factor formed.

    f  ~ U1 V1^T    any factor of f, rows normalised; k1 columns                      (Lemma 3.3)
    c  ~ U1 (V1^T V) - Y                                                              (Lemma 3.4)
    q  ~ U2 V2^T    U2 = c~, V2 = V: k2 = d_value columns, not 2 d                    (Lemma 3.5)
    p1 ~ U3 V3^T    row-wise Kronecker products of U1, U2 and of V1, V2: k1 k2        (Lemma 3.6)
    p2 ~ U4 V4^T    U4 = diag(rho~) U1, V4 = V1                                       (Lemma 3.7)

    dl/dQ = beta (U3 (V3^T K) - U4 (V4^T K))
    dl/dK = beta (V3 (U3^T Q) - V4 (U4^T Q))
    dl/dV = V1 (U1^T c~)

Both p1 and p2 come from the same f~ whose rows sum to 1, so p~ 1 = 0 exactly and K may be centred.
The fast gradient differentiates the factored forward instead. With P_g in place of exp, D_g its row
sums, mu and nu the centres:

    fast(g + 1):  h = diag(D_g / D_{g+1}) f~_g,  p^ = h o (q~_{g+1} - rho~_{g+1} 1^T)
                  dl/dQ = beta p^ (K - 1 mu^T)
                  dl/dW_K = beta (X_K - 1 m^T)^T (p^^T (Q - 1 nu^T) + p~_{g+1}^T 1 nu^T)
    chain(g):     p~ = f~_g o (q~_g - rho~_g 1^T)

for Taylor, m the mean of X_K behind mu: residual and mean are one degree higher, and but for the
diagonal the kernel is the chain's. p^ 1 is not 0, so the centres matter there.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.checks import fail, set_integers
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import row_range
from lora_limits.coordinates.sampling import sample_rows
from lora_limits.linalg import dot, row_norms
from lora_limits.method import GradientResult, Method, Sampling, refuse_sampling
from lora_limits.polynomial import monomials
from lora_limits.polynomial import series as polynomial
from lora_limits.problem import Adapter, LoRAProblem, projections, pull_back, scalars
from lora_limits.problem_checks import refuse_structure


@dataclasses.dataclass(frozen=True)
class Chain(Method):
    """The paper's chain on a polynomial factor of f.

    k1 = binom(d + degree, degree), and U3, V3 of k1 d_value columns: O(L k1 d_value d) time and
    O(L k1 d_value) memory, a factor of about d above `Polynomial`, and no certificate: it is there
    to be compared with. series as in `Polynomial`, here for P itself. An odd degree or a series
    other than Taylor may have row sums that are not positive; the result is then worthless, and
    nothing says so.
    Raises ValueError for a degree that is not an integer of at least 0 or an unknown series.
    """

    degree: int
    series: str = "taylor"

    def __post_init__(self):
        set_integers(self, degree=0)
        if self.series not in polynomial.SERIES:
            fail("Chain series", repr(self.series), f"one of {list(polynomial.SERIES)}")

    def solve(self, problem: LoRAProblem, sampling: Sampling | None = None) -> GradientResult:
        """As Method.solve; it does not estimate its error."""
        refuse_sampling(self, sampling)
        u1, v1 = polynomial_factor(problem, self.degree, self.series)
        loss, gradient = chain_gradient(problem, u1, v1)
        return GradientResult(gradient, loss, rank=u1.shape[1])


class ChainTerms(NamedTuple):
    """Every intermediate as a factor: f~ = u1 v1^T, q~ = u2 v2^T, p1~ = u3 v3^T, p2~ = u4 v4^T."""

    u1: Float[Array, "lq k1"]  # rows of u1 v1^T sum to 1
    v1: Float[Array, "lk k1"]
    c: Float[Array, "lq dv"]
    u2: Float[Array, "lq dv"]
    v2: Float[Array, "lk dv"]
    rho: Float[Array, " lq"]
    u3: Float[Array, "lq k1_dv"]
    v3: Float[Array, "lk k1_dv"]
    u4: Float[Array, "lq k1"]
    v4: Float[Array, "lk k1"]


def row_kronecker(a: Float[Array, "n m"], b: Float[Array, "n k"]) -> Float[Array, "n m_k"]:
    """Row j is a_j kron b_j.

    So (A B^T) o (C D^T) = row_kronecker(A, C) row_kronecker(B, D)^T.
    """
    return (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)


def chain_terms(
    problem: LoRAProblem, u1: Float[Array, "lq k1"], v1: Float[Array, "lk k1"]
) -> ChainTerms:
    """Lemmas 3.4 to 3.7 from any factor of f. O(L k1 d_value) time and memory.

    Rows of u1 are divided by the row sums of u1 v1^T first; these must not be 0.
    """
    refuse_structure(problem, "a chain")
    v = projections(problem)[2]
    u1 = u1 / dot(u1, v1.sum(0)[:, None])
    out = dot(u1, dot(v1.T, v))
    c = out - problem.target
    rho = (c * out).sum(-1)
    return ChainTerms(
        u1=u1,
        v1=v1,
        c=c,
        u2=c,
        v2=v,
        rho=rho,
        u3=row_kronecker(u1, c),
        v3=row_kronecker(v1, v),
        u4=rho[:, None] * u1,
        v4=v1,
    )


def gradient_of_terms(problem: LoRAProblem, t: ChainTerms) -> dict[str, Adapter]:
    """The adapters' gradients from the factors."""
    q, k, _ = projections(problem)
    # p~ 1 = 0: the same gradient, less cancellation
    k = k - k.mean(0, keepdims=True)
    beta = scalars(problem)[1]
    rows = {
        "query": lambda: beta * (dot(t.u3, dot(t.v3.T, k)) - dot(t.u4, dot(t.v4.T, k))),
        "key": lambda: beta * (dot(t.v3, dot(t.u3.T, q)) - dot(t.v4, dot(t.u4.T, q))),
        "value": lambda: dot(t.v1, dot(t.u1.T, t.c)),
    }
    return {name: pull_back(problem, name, rows[name]()) for name in problem.adapters}


def chain_gradient(
    problem: LoRAProblem, u1: Float[Array, "lq k1"], v1: Float[Array, "lk k1"]
) -> tuple[Float[Array, ""], dict[str, Adapter]]:
    """(loss, adapter gradients) of Theorems 3.1 and A.1 from any factor of f, as `chain_terms`.

    O(L k1 d_value d) time, O(L k1 d_value) memory.
    """
    terms = chain_terms(problem, u1, v1)
    return 0.5 * (terms.c**2).sum(), gradient_of_terms(problem, terms)


def polynomial_factor(
    problem: LoRAProblem, degree: int, series: str = "taylor"
) -> tuple[Float[Array, "lq k1"], Float[Array, "lk k1"]]:
    """(U1, V1) with U1 V1^T = D^-1 P(S) diag(w), scores in the frame; rows sum to 1.

    P of the given degree is Taylor's, the Chebyshev series of exp on [-R, R], or a fit to a sample
    of scores: the derivative of what `Polynomial` takes one degree higher. O(L k1) time beside the
    projections.
    """
    frame = frames.of_problem(problem)
    q = frame.centred_queries(problem, jnp.asarray(problem.x_query))
    k = frame.centred_keys(problem, jnp.asarray(problem.x_key))
    x, y = frame.x(q), frame.y(k)
    w = jnp.exp(frame.log_weights(k))
    radius = row_range(x.T, row_norms(y).max(), jnp.abs(y).max(0)).max()
    radius = jnp.maximum(radius, 0.05)
    few = sample_rows(x, 64)
    s = jnp.clip(dot(few, y.T), -radius, radius).reshape(-1)
    sample = (s, jnp.tile(w, few.shape[0]) + jnp.finfo(w.dtype).tiny)
    c = polynomial.derivative(polynomial.coefficients(series, degree + 1, radius, sample))
    u1 = (monomials.features(x.T, degree) * monomials.coefficients(c, x.shape[1])).T
    v1 = monomials.features(y.T, degree).T * w[:, None]
    return u1 / dot(u1, v1.sum(0)[:, None]), v1
