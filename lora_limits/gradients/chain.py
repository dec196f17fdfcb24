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
from jaxtyping import Array, Bool, Float

from lora_limits.checks import fail, set_integers
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import row_range
from lora_limits.coordinates.sampling import sample_rows
from lora_limits.heads.tokens import pattern_of, tokens_of
from lora_limits.heads.visibility import visible_pairs
from lora_limits.linalg import dot, row_norms
from lora_limits.method import GradientResult, Method, Sampling, refuse_sampling
from lora_limits.polynomial import monomials
from lora_limits.polynomial import series as polynomial
from lora_limits.problem import Adapter, LoRAProblem, projections, pull_back, scalars
from lora_limits.problem_checks import STRUCTURE, structure_of


@dataclasses.dataclass(frozen=True)
class Chain(Method):
    """The paper's chain on a polynomial factor of f.

    k1 = binom(d + degree, degree), and U3, V3 of k1 d_value columns: O(L k1 d_value d) time and
    O(L k1 d_value) memory, a factor of about d above `Polynomial`, and no certificate: it is there
    to be compared with. series as in `Polynomial`, here for P itself. An odd degree or a series
    other than Taylor may have row sums that are not positive; the result is then worthless, and
    nothing says so.
    Rotations turn Q and K before they are factored, and keys that are not there are rows of zeros.
    A causal order and documents leave no product of two thin factors: every term is then formed and
    masked, O(Lq Lk k1 d_value) time.
    Raises ValueError for a degree that is not an integer of at least 0 or an unknown series.
    """

    degree: int
    series: str = "taylor"
    knows = frozenset(STRUCTURE)

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


def _seen(problem: LoRAProblem) -> Bool[Array, "lq_or_1 lk"] | None:
    """Which pairs see each other; None where all do, or padding alone decides, which V1 has in it."""
    if not set(structure_of(problem)) & {"causal", "segments"}:
        return None
    return visible_pairs(pattern_of(problem), tokens_of(problem))


def _apply(
    seen: Bool[Array, "lq_or_1 lk"] | None,
    u: Float[Array, "lq k"],
    v: Float[Array, "lk k"],
    z: Float[Array, "lk n"],
) -> Float[Array, "lq n"]:
    """U V^T z, of the pairs that see each other."""
    if seen is None:
        return dot(u, dot(v.T, z))
    return dot(jnp.where(seen, dot(u, v.T), 0), z)


def chain_terms(
    problem: LoRAProblem, u1: Float[Array, "lq k1"], v1: Float[Array, "lk k1"]
) -> ChainTerms:
    """Lemmas 3.4 to 3.7 from any factor of f. O(L k1 d_value) time and memory.

    Rows of u1 are divided by the row sums of u1 v1^T first; these must not be 0.
    """
    v = projections(problem)[2]
    seen = _seen(problem)
    if problem.key_mask is not None:
        v1 = jnp.where(problem.key_mask[:, None], v1, 0)
    u1 = _normalised(problem, u1, v1)
    out = _apply(seen, u1, v1, v)
    c = out - problem.target
    if problem.query_mask is not None:
        c = jnp.where(problem.query_mask[:, None], c, 0)
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
    seen = _seen(problem)
    by_key = None if seen is None else jnp.broadcast_to(seen, (q.shape[0], k.shape[0])).T
    rows = {
        "query": lambda: beta * (_apply(seen, t.u3, t.v3, k) - _apply(seen, t.u4, t.v4, k)),
        "key": lambda: beta * (_apply(by_key, t.v3, t.u3, q) - _apply(by_key, t.v4, t.u4, q)),
        "value": lambda: _apply(by_key, t.v1, t.u1, t.c),
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
    x, y, w = _framed(problem)
    radius = row_range(x.T, row_norms(y).max(), jnp.abs(y).max(0)).max()
    radius = jnp.maximum(radius, 0.05)
    few = sample_rows(x, 64)
    s = jnp.clip(dot(few, y.T), -radius, radius).reshape(-1)
    sample = (s, jnp.tile(w, few.shape[0]) + jnp.finfo(w.dtype).tiny)
    c = polynomial.derivative(polynomial.coefficients(series, degree + 1, radius, sample))
    u1 = (monomials.features(x.T, degree) * monomials.coefficients(c, x.shape[1])).T
    v1 = monomials.features(y.T, degree).T * w[:, None]
    return _normalised(problem, u1, v1), v1


def _normalised(
    problem: LoRAProblem, u1: Float[Array, "lq k1"], v1: Float[Array, "lk k1"]
) -> Float[Array, "lq k1"]:
    """U1 over the row sums of U1 V1^T; rows that see nothing, whose sums are 0, as they are."""
    seen = _seen(problem)
    if seen is None and problem.key_mask is None:
        return u1 / dot(u1, v1.sum(0)[:, None])
    total = _apply(seen, u1, v1, jnp.ones_like(v1[:, :1]))
    return u1 / jnp.where(total != 0, total, 1)


def _framed(
    problem: LoRAProblem,
) -> tuple[Float[Array, "lq d"], Float[Array, "lk d"], Float[Array, " lk"]]:
    """(x, y, w) with f in proportion to w_j exp(x_i . y_j), centred and balanced."""
    if not structure_of(problem):
        frame = frames.of_problem(problem)
        q = frame.centred_queries(problem, jnp.asarray(problem.x_query))
        k = frame.centred_keys(problem, jnp.asarray(problem.x_key))
        return frame.x(q), frame.y(k), jnp.exp(frame.log_weights(k))
    # rotated rows are no linear function of the inputs: they are centred themselves
    root = jnp.sqrt(scalars(problem)[1])
    q, k, v = projections(problem)
    q, k = root * q, root * k
    tokens = tokens_of(problem)
    frame = frames.of_rows(q, k, v, tokens.query, tokens.key)
    k = k - frame.mu[None]
    return frame.x(q - frame.nu[None]), frame.y(k), frame.weights(k, tokens.key)
