"""What every method promises: `solve`, and the result that still knows what it is worth."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

from lora_limits.checks import fail
from lora_limits.problem import Adapter, LoRAProblem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientResult:
    """A gradient that still knows what it is worth.

    gradient: {name: Adapter}, dl/dA and dl/dB. loss: scalar, of the same (approximate) forward.
    rank: k, the width of the factor of f; None for an exact gradient.
    bound: {name: Adapter of scalars}, certified max-norm error of each array, rounding included:
    never below the error, whatever the input. Deterministic; it rests on IEEE arithmetic and on an
    exp that errs by at most 4 units in the last place (certificate/rounding.py). inf where nothing
    could be certified; None for methods without a guarantee, and for exact ones. Loose where a
    problem has an order, rotations or masks (gradients/by_rows_range.py), and of Taylor's series alone.
    confident: {name: Adapter of scalars}, like `bound`, but it holds with probability 1 - delta
    over the library's own draws, whatever the problem; much smaller. None unless asked for.
    normaliser: a certified lower bound of min_i D_i / sum_j w_j, the smallest row sum of the
    approximate exp(S) relative to its value at P = 1. Not positive: some row may not be a
    distribution, the gradient is not to be trusted, and the remedy is a higher or an even degree,
    or Exact. None where there is nothing to certify. For factors without a guarantee, the smallest
    row sum before they are divided out: not positive is as bad.
    estimate: {name: Adapter of Estimate}, the error of each array as estimated from sampled query
    rows, with 95 % confidence intervals; None unless asked for, but for factors without a
    guarantee. Closer to the truth than `bound`.
    relative_error: {name: Adapter of scalars}, the Frobenius norm of the error over that of the
    true array, estimated from the same rows. failed: True where one of them is half or more,
    something is not finite or a row sum not positive: the gradient is not to be used. Both None for
    methods with a guarantee, for exact ones and for Chain.
    """

    gradient: dict[str, Adapter]
    loss: jax.Array
    rank: int | None = dataclasses.field(metadata={"static": True})
    bound: dict[str, Adapter] | None = None
    confident: dict[str, Adapter] | None = None
    normaliser: jax.Array | None = None
    estimate: dict[str, Adapter] | None = None
    relative_error: dict[str, Adapter] | None = None
    failed: jax.Array | None = None


class Sampling(NamedTuple):
    """Which queries are looked at exactly, for what is said of an error beside a certificate."""

    rows: int  # how many are drawn, with replacement
    key: jax.Array  # to draw them with; it must not depend on the problem
    delta: float = 1e-6  # the chance at which `confident` may be wrong


class Method:
    """A way to compute the gradient: a frozen dataclass with a `solve` of its own.

    Frozen and hashable. To JAX it is a pytree without leaves, so that jit compiles once for each
    method whether or not it is named among the static arguments.
    knows: which of problem_checks.STRUCTURE (causal, rotations, ...) `solve` takes into account;
    problems that have anything else are refused before it is called.
    """

    knows: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)

    def solve(self, problem: LoRAProblem, sampling: Sampling | None = None) -> GradientResult:
        """The gradient of a problem that is checked, and settled (heads/tokens.py).

        Raises ValueError for a sampling where the method has no error to estimate.
        """
        raise NotImplementedError


def refuse_sampling(method: Method, sampling: Sampling | None) -> None:
    """Raises ValueError if sampled rows were asked of a method that does not estimate its error."""
    if sampling is not None:
        fail("rows", f"{sampling.rows!r} with {method!r}", "a method whose error is estimated")
