"""The law of the degree: Taylor's remainder at real degrees, and solved for either of its arguments.

An approximation of degree g needs T_g(rho) = eps, where T_g(rho) = sum_{n>g} rho^n / n! is attained
at a score of rho. By the bound, rho is R, the largest score. What a problem needs says which rho it
behaves as if it had: its effective radius, which is R where the bound is attained, and far less
where most scores are far from it.
"""

from __future__ import annotations

import math

from lora_limits.checks import fail

LARGEST_DEGREE = 1e6
LARGEST_RADIUS = 1e5


def log_remainder(degree: float, radius: float) -> float:
    """ln T_g(rho), the logarithm of Taylor's remainder; g > -1 need not be an integer.

    sum_{n>g} rho^n / n! = exp(rho) P(g + 1, rho), P the regularised incomplete gamma function, which
    carries it to real degrees. -inf at rho = 0.
    """
    # scipy is slow to import, and few programs come here
    from scipy.special import gammainc

    if radius <= 0:
        return -math.inf
    share = float(gammainc(degree + 1, radius))
    if share > 0:
        return radius + math.log(share)
    # below what a float holds: the first term, and a geometric series behind it
    first = (degree + 1) * math.log(radius) - math.lgamma(degree + 2)
    return first - math.log1p(-radius / (degree + 2))


def degree_of(radius: float, tolerance: float) -> float:
    """The real degree g >= 0 with T_g(radius) = tolerance; 0 where degree 0 is within it.

    Raises ValueError unless radius >= 0 and 0 < tolerance < 1.
    """
    _check(tolerance)
    if not 0 <= radius < LARGEST_RADIUS:
        fail("radius", radius, f"a number from 0 to {LARGEST_RADIUS:g}")

    def excess(degree: float) -> float:
        return log_remainder(degree, radius) - math.log(tolerance)

    if excess(0.0) <= 0:
        return 0.0
    return _zero(excess, 0.0, 3 * radius + 10 - math.log(tolerance))


def radius_of(degree: float, tolerance: float) -> float:
    """The effective radius: rho > 0 with T_degree(rho) = tolerance. The inverse of `degree_of`.

    Raises ValueError unless 0 <= degree <= 1e6 and 0 < tolerance < 1.
    """
    _check(tolerance)
    if not 0 <= degree <= LARGEST_DEGREE:
        fail("degree", degree, f"a number from 0 to {LARGEST_DEGREE:g}")

    def excess(log_radius: float) -> float:
        return log_remainder(degree, math.exp(log_radius)) - math.log(tolerance)

    # T_g(rho) < rho^(g+1) / (g+1)! e^rho; at rho = g + 1 it is above 1 > tolerance
    return math.exp(_zero(excess, math.log(tolerance) - 1, math.log(degree + 1)))


def _zero(function, low: float, high: float) -> float:
    from scipy.optimize import brentq

    return float(brentq(function, low, high, xtol=1e-12))  # pyright: ignore[reportArgumentType]


def _check(tolerance: float) -> None:
    if not 0 < tolerance < 1:
        fail("tolerance", tolerance, "a number between 0 and 1")
