"""From the errors of degrees to the degree that a tolerance needs, and to k*, the features of it.

Errors are not monotone in the degree (an odd one, whose leading error cancels on average, can beat
the even one above it), but those of one parity fall in line. So each parity is asked by itself: the
degree needed is the first from which all of its parity are within the tolerance, and between it and
the one before the logarithm of the error is a straight line, on which the crossing is read. That
gives k* as a smooth function of the norm, where the degrees themselves are steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def crossing(errors: Sequence[float], parity: int, tolerance: float) -> tuple[int, float] | None:
    """(degree, interpolated degree) at which the errors of a parity stay within the tolerance.

    errors: of degrees 0, 1, ... None where the last of the parity is not within it (or not a
    number). The lowest degree of the parity is not interpolated: there is none before it.
    """
    degrees = range(parity, len(errors), 2)
    first = None
    for degree in reversed(degrees):
        if not errors[degree] <= tolerance:
            break
        first = degree
    if first is None:
        return None
    if first == degrees[0]:
        return first, float(first)
    before = errors[first - 2]
    if not math.isfinite(before):  # P was not positive there
        return first, float(first)
    # an error of 0 is beyond rounding: as good as the smallest number
    after = max(errors[first], 1e-300)
    share = math.log(before / tolerance) / math.log(before / after)
    return first, first - 2 + 2 * share


def features(width: int, degree: float) -> float:
    """k = binom(d + g, g), for a real degree by the gamma function."""
    log_k = math.lgamma(width + degree + 1) - math.lgamma(width + 1) - math.lgamma(degree + 1)
    return math.exp(log_k)


def needed(errors: Sequence[float], tolerance: float, *, width: int, length: int) -> dict[str, Any]:
    """What a tolerance needs: {"degree", "features", "real", "odd", "even", "exponent"}.

    degree: the smaller of both parities', and its features, as a user would pick; odd, even: the
    interpolated degrees; real: the smaller of them; exponent: log k* / log L at it. None where no
    degree measured is enough.
    """
    found = {
        name: crossing(errors, parity, tolerance) for parity, name in ((1, "odd"), (0, "even"))
    }
    there = [x for x in found.values() if x is not None]
    out: dict[str, Any] = {name: None if x is None else round(x[1], 3) for name, x in found.items()}
    if not there:
        return out | {"degree": None, "features": None, "real": None, "exponent": None}
    degree = min(x[0] for x in there)
    real = min(x[1] for x in there)
    exponent = math.log(features(width, real)) / math.log(length)
    return out | {
        "degree": degree,
        "features": math.comb(width + degree, degree),
        "real": round(real, 3),
        "exponent": round(exponent, 4),
    }
