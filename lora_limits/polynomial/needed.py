"""From a score bound R to a degree g and a width k: Lemma 3.3 with its constants, on the host, by
counting alone.

Nothing here touches a token, so it reaches lengths that no computer holds.
"""

from __future__ import annotations

import math

import numpy as np


def remainder(degree: int, radius: float, series: str = "taylor") -> float:
    """T with |exp(s) - P_g(s)| <= T on [-R, R]: sum_{n>g} R^n / n! for Taylor, 2 sum_{n>g} I_n(R)
    for Chebyshev.

    Both are attained, at s = R. The best polynomial of degree g has an error of at least (pi/2)
    I_{g+1}(R), and the Chebyshev series is within a small factor of it. inf beyond float64. Raises
    ValueError for another series.
    """
    from scipy.special import gammainc, ive

    if series not in ("taylor", "chebyshev"):
        raise ValueError(f"remainder series: got {series!r}, expected 'taylor' or 'chebyshev'")
    if radius >= 700:
        return math.inf
    if series == "taylor":
        return float(gammainc(degree + 1, radius)) * math.exp(radius)
    orders = np.arange(degree + 1, degree + 64 + 2 * math.ceil(radius))
    return 2 * float(ive(orders, radius).sum()) * math.exp(radius)


def row_error(degree: int, radius: float, series: str = "taylor") -> float:
    """Lemma 3.3 made explicit: delta_i = sum_j |f~_ij - f_ij| <= 2 T / (1 - T), T = remainder; inf
    where T >= 1.

    Keys centred under the weights w make Z_i = sum_j w_j e^{s_ij} >= sum_j w_j (Jensen), so D_i >=
    (1 - T) sum_j w_j, and no e^R is left. radius >= every |centred score|.
    """
    left_out = remainder(degree, radius, series)
    return 2 * left_out / (1 - left_out) if left_out < 1 else math.inf


def degree_needed(radius: float, tolerance: float, series: str = "chebyshev") -> int:
    """The smallest degree g with remainder(g, R) <= tolerance. O(log g) remainders."""
    low = -1
    high = 1
    while remainder(high, radius, series) > tolerance:
        low = high
        high = 2 * high
        if high > 2**20:
            raise ValueError(
                f"radius: got {radius}, expected one for which some degree below 2^20 reaches {tolerance}"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if remainder(middle, radius, series) <= tolerance else (middle, high)
        )
    return high


def width_exponent(width: int, degree: int, log_length: float) -> float:
    """log k / log L with k = binom(d + g, g): the almost linear algorithm takes L^{1 + this}, up to
    factors of d.

    By log-gamma, so that k need not be representable. log_length: ln L.
    """
    log_k = math.lgamma(width + degree + 1) - math.lgamma(width + 1) - math.lgamma(degree + 1)
    return log_k / log_length


def limit_exponent(score_ratio: float, width_ratio: float = 1 / math.log(2)) -> float:
    """The limit of log k / log L as L grows, at R = score_ratio ln L, d = width_ratio ln L and
    tolerance 1/L.

    With g = x ln L, Chebyshev's remainder is I_g(R) up to factors that do not count, and uniformly
    (Debye)
    ln I_g(R) ~ g eta(R / g), eta(z) = sqrt(1 + z^2) + ln(z / (1 + sqrt(1 + z^2))). So x solves
    x eta(score_ratio / x) = -1, and k = binom(d + g, g) gives (a + x) ln(a + x) - a ln a - x ln x
    with a = width_ratio. Finite L approaches it from below, as Stirling's square roots are left
    out. score_ratio > 0.
    """
    from scipy.optimize import brentq

    def excess(x: float) -> float:
        z = score_ratio / x
        root = math.hypot(1, z)
        return x * (root + math.log(z / (1 + root))) + 1

    a, x = width_ratio, float(brentq(excess, 1e-9, 1e3 + 10 * score_ratio))  # pyright: ignore[reportArgumentType]
    return (a + x) * math.log(a + x) - a * math.log(a) - x * math.log(x)
