"""What every method promises: `solve`, and the result that still knows what it is worth."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lora_limits.checks import fail
from lora_limits.problem import Adapter, LoRAProblem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientResult:
    """A gradient that still knows what it is worth.

    gradient: {name: Adapter}, dl/dA and dl/dB. loss: scalar, of the same (approximate) forward.
    rank: k, the width of the factor of f; None for an exact gradient.
    bound: {name: Adapter of scalars}, certified max-norm error of each array, rounding included;
    inf where the normaliser could not be certified; None for methods without a guarantee, and for
    exact ones.
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
    normaliser: jax.Array | None = None
    estimate: dict[str, Adapter] | None = None
    relative_error: dict[str, Adapter] | None = None
    failed: jax.Array | None = None


class Method:
    """A way to compute the gradient: a frozen dataclass with a `solve` of its own.

    Frozen and hashable, so that it can be a static argument of jit.
    """

    def solve(
        self, problem: LoRAProblem, rows: int | None, key: jax.Array | None
    ) -> GradientResult:
        """The gradient of a checked problem; rows, key: as in `gradient`, both or neither None.

        Raises ValueError for `rows` where the method has no error to estimate.
        """
        raise NotImplementedError


def refuse_rows(method: Method, rows: Any) -> None:
    """Raises ValueError if sampled rows were asked of a method that does not estimate its error."""
    if rows is not None:
        fail("rows", f"{rows!r} with {method!r}", "a method whose error is estimated")
