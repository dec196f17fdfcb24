"""The gradient of a head as arrays: its error against the exact one, its noise over the windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora_limits.diagnose.times import run
from lora_limits.gradients.cost import exact_method
from lora_limits.instruments.comparing import frobenius_error, named
from lora_limits.method import Method
from lora_limits.problem import LoRAProblem

Arrays = dict[str, np.ndarray]


def arrays(problem: LoRAProblem, method: Method) -> tuple[Arrays, int | None]:
    """({"query.a": gradient array, ...}, rank of the factor)."""
    result = run(problem, method=method)
    return named(result.gradient, dtype=None), result.rank


def exact_arrays(problem: LoRAProblem) -> Arrays:
    """The exact gradient's arrays."""
    return arrays(problem, exact_method(problem))[0]


def error(got: Arrays, exact: Arrays) -> float:
    """Relative Frobenius error, the largest over the arrays.

    inf where a gradient that is zero does not come out as zero, or something is not finite.
    """
    found = [frobenius_error(got[name], x) for name, x in exact.items()]
    # max alone would lose a NaN.
    return max(found) if all(map(math.isfinite, found)) else math.inf


def noise(exact: Sequence[Arrays]) -> float | None:
    """Spread of the gradient over the windows, relative: the noise of a mini-batch of one.

    sqrt(sum of variances / mean of squared norms), the smallest over the arrays; None for fewer
    than two windows, and where all arrays are zero.
    """
    if len(exact) < 2:
        return None
    least = math.inf
    for name in exact[0]:
        rows = np.stack([x[name].ravel() for x in exact]).astype(np.float64)
        variance = float(rows.var(0, ddof=1).sum())
        square = float((rows**2).sum(1).mean())
        if square > 0:
            least = min(least, math.sqrt(variance / square))
    return least if math.isfinite(least) else None
