"""The verb: a LoRAProblem and a method go in, a GradientResult comes out."""

from __future__ import annotations

import dataclasses

import jax

from lora_limits import factors
from lora_limits.checks import check_integer
from lora_limits.factors import FactorMethod
from lora_limits.gradients import chain, exact, sweeps
from lora_limits.gradients.chain import Chain
from lora_limits.polynomial import monomials
from lora_limits.polynomial.series import SERIES
from lora_limits.problem import Adapter, LoRAProblem, check_static


@dataclasses.dataclass(frozen=True)
class Exact:
    """The exact gradient. block_size None: dense, O(Lq Lk) memory; else tiled on both sides, O(L d
    + block_size^2).
    """

    block_size: int | None = None

    def __post_init__(self):
        if self.block_size is not None:
            check_integer("Exact block_size", self.block_size, 1)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """exp replaced by a polynomial of the given degree in the scores: k = binom(d + degree, degree)
    features.

    series: "taylor" (tightest certificate), "chebyshev" (minimax on the score range), "fitted"
    (least squares on a sample of scores). centred: shift queries and keys first, which changes
    nothing in exact arithmetic and shrinks the scores. block_size: tokens whose features are held
    at once; None: as many as keep a block in a CPU's cache or, on an accelerator, in 128 MiB
    (float32).
    Raises ValueError for a negative degree or an unknown series.
    """

    degree: int
    series: str = "taylor"
    centred: bool = True
    block_size: int | None = None

    def __post_init__(self):
        check_integer("Polynomial degree", self.degree, 0)
        if self.block_size is not None:
            check_integer("Polynomial block_size", self.block_size, 1)
        if self.series not in SERIES:
            raise ValueError(
                f"Polynomial series: got {self.series!r}, expected one of {list(SERIES)}"
            )


Method = Exact | Polynomial | Chain | FactorMethod


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientResult:
    """A gradient that still knows what it is worth.

    gradient: {name: Adapter}, dl/dA and dl/dB. loss: scalar, of the same (approximate) forward.
    rank: k, the width of the factor of f; None for an exact gradient.
    bound: {name: Adapter of scalars}, certified max-norm error of each array, rounding included;
    inf where the normaliser could not be certified; None for methods without a guarantee, and for
    exact ones. normaliser: a certified lower bound of min_i D_i / sum_j w_j, the smallest row sum
    of the approximate exp(S) relative to its value at P = 1. Not positive: some row may not be a
    distribution, the gradient is not to be trusted, and the remedy is a higher or an even degree,
    or Exact. None where there is nothing to certify. For factors without a guarantee, the smallest
    row sum before they are divided out: not positive is as bad. estimate: {name: Adapter of
    Estimate}, the error of each array as estimated from sampled query rows, with 95 % confidence
    intervals; None unless asked for, but for factors without a guarantee. Closer to the truth than
    `bound`. relative_error: {name: Adapter of scalars}, the Frobenius norm of the error over that
    of the true array, estimated from the same rows. failed: True where one of them is half or more,
    something is not finite or a row sum not positive: the gradient is not to be used. Both None for
    methods with a guarantee, for exact ones and for Chain.
    """

    gradient: dict[str, Adapter]
    loss: jax.Array
    rank: int | None = dataclasses.field(metadata={"static": True})
    bound: dict[str, Adapter] | None = None
    normaliser: jax.Array | None = None
    estimate: dict[str, Adapter] | None = None
    relative_error: dict[str, Adapter] | None = None
    failed: jax.Array | None = None


def gradient(
    problem: LoRAProblem, method: Method, *, rows: int | None = None, key: jax.Array | None = None
) -> GradientResult:
    """Gradients of the loss in every adapter of the problem.

    dl/dA = s B^T (dl/dW), dl/dB = s (dl/dW) A^T with dl/dW_Q = beta X_Q^T p K, dl/dW_K = beta X_K^T
    p^T Q,
    dl/dW_V = X_V^T f^T c (Lemmas 3.1, 3.2, D.4, corrected). jit with `method` (and `rows`) static;
    vmap over a batch of problems. rows, key: for `estimate`, how many queries to draw and the key
    to draw them with; not with Exact, Chain. Exact: O(Lq Lk (d + d_value)). Polynomial: O(L k (d +
    1)), k = binom(d + g, g); valid for any input, useful while max |score| = o(log L) (Theorems 3.1
    and A.1); its estimate O(rows L (d + d_model)). Other factors: see factors/. Raises ValueError
    for problems that do not fit together, and for `rows` without `key` or with a method that they
    do not apply to.
    """
    check_static(problem)
    if (rows is None) != (key is None):
        raise ValueError(f"rows, key: got {rows!r}, {key!r}, expected both or neither")
    if rows is not None and not isinstance(method, Polynomial | FactorMethod):
        raise ValueError(
            f"rows: got {rows!r} with {method!r}, expected a method whose error is estimated"
        )
    if isinstance(method, Exact):
        if method.block_size is None:
            loss, grads = exact.dense_gradient(problem)
        else:
            loss, grads = exact.tiled_gradient(problem, method.block_size)
        return GradientResult(grads, loss, rank=None)
    if isinstance(method, Polynomial):
        loss, grads, bound, normaliser, estimated = sweeps.run(problem, method, rows, key)
        rank = monomials.count(problem.weights.query.shape[1], method.degree)
        return GradientResult(grads, loss, rank, bound, normaliser, estimated)
    if isinstance(method, Chain):
        loss, grads, rank = chain.run(problem, method)
        return GradientResult(grads, loss, rank)
    if isinstance(method, FactorMethod):
        done = factors.run(problem, method, rows, key)
        return GradientResult(
            done.gradient,
            done.loss,
            done.rank,
            normaliser=done.normaliser,
            estimate=done.estimate,
            relative_error=done.relative_error,
            failed=done.failed,
        )
    raise ValueError(
        f"method: got {method!r}, expected Exact, Polynomial, Chain or a factor (Svd, Skeleton, ...)"
    )


def loss(problem: LoRAProblem) -> jax.Array:
    """The exact loss 1/2 || f V - Y ||_F^2 (Definition 1.2, one data point). O(Lq Lk d) time,
    memory linear in L.
    """
    check_static(problem)
    return exact.tiled_loss(problem)
