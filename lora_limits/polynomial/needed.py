"""From a score bound R to a degree g and a width k: Lemma 3.3 with its constants, counted.

Nothing here touches a token, so it reaches lengths that no computer holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lora_limits.checks import fail

LARGEST_RADIUS = 700  # exp(R) is no longer a float64 much above it
LARGEST_DEGREE = 2**20


def remainder(degree: int, radius: float, series: str = "taylor") -> float:
    """T with |exp(s) - P_g(s)| <= T on [-R, R].

        taylor       sum_{n>g} R^n / n!
        chebyshev    2 sum_{n>g} I_n(R)

    Both are attained, at s = R. The best polynomial of degree g has an error of at least (pi/2)
    I_{g+1}(R), and the Chebyshev series is within a small factor of it. inf beyond float64.
    Raises ValueError for another series.
    """
    # scipy is slow to import, and few programs come here.
    from scipy.special import gammainc, ive

    if series not in ("taylor", "chebyshev"):
        fail("remainder series", repr(series), "'taylor' or 'chebyshev'")
    if radius >= LARGEST_RADIUS:
        return math.inf
    if series == "taylor":
        # the regularised incomplete gamma function is exp(-R) times the sum
        return float(gammainc(degree + 1, radius)) * math.exp(radius)
    # I_n(R) falls faster than geometrically once n passes R: the rest is below rounding.
    orders = np.arange(degree + 1, degree + 64 + 2 * math.ceil(radius))
    return 2 * float(ive(orders, radius).sum()) * math.exp(radius)


def row_error(degree: int, radius: float, series: str = "taylor") -> float:
    """Lemma 3.3 made explicit: delta_i = sum_j |f~_ij - f_ij| <= 2 T / (1 - T), T = remainder.

    Keys centred under the weights w make Z_i = sum_j w_j e^{s_ij} >= sum_j w_j (Jensen), so D_i >=
    (1 - T) sum_j w_j, and no e^R is left. radius >= every |centred score|. inf where T >= 1.
    """
    left_out = remainder(degree, radius, series)
    return 2 * left_out / (1 - left_out) if left_out < 1 else math.inf


def degree_needed(radius: float, tolerance: float, series: str = "chebyshev") -> int:
    """The smallest degree g with remainder(g, R) <= tolerance. O(log g) remainders.

    Raises ValueError where no degree below 2^20 reaches the tolerance.
    """

    def enough(degree: int) -> bool:
        if degree > LARGEST_DEGREE:
            fail("radius", radius, f"one for which some degree below 2^20 reaches {tolerance}")
        return remainder(degree, radius, series) <= tolerance

    return smallest(enough, 0)


def smallest(enough: Callable[[int], bool], first: int) -> int:
    """The smallest integer from `first` on that is enough, given that all above it are too.

    O(log result) calls; it ends where one is enough.
    """
    # Double until it is enough, then halve the gap to the last that was not.
    low = first - 1
    high = max(first, 1)
    while not enough(high):
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def width_exponent(width: int, degree: int, log_length: float) -> float:
    """log k / log L with k = binom(d + g, g), log_length = ln L.

    The almost linear algorithm takes L^{1 + this}, up to factors of d. By log-gamma, so that k need
    not be representable.
    """
    log_k = math.lgamma(width + degree + 1) - math.lgamma(width + 1) - math.lgamma(degree + 1)
    return log_k / log_length


def limit_exponent(score_ratio: float, width_ratio: float = 1 / math.log(2)) -> float:
    """The limit of log k / log L as L grows.

    At R = score_ratio ln L > 0, d = width_ratio ln L and tolerance 1/L. With g = x ln L,
    Chebyshev's remainder is I_g(R) up to factors that do not count, and uniformly (Debye)

        ln I_g(R) ~ g eta(R / g),    eta(z) = sqrt(1 + z^2) + ln(z / (1 + sqrt(1 + z^2))).

    So x solves x eta(score_ratio / x) = -1, and k = binom(d + g, g) gives
    (a + x) ln(a + x) - a ln a - x ln x with a = width_ratio. Finite L approaches it from below, as
    Stirling's square roots are left out.
    """
    from scipy.optimize import brentq

    def excess(x: float) -> float:
        z = score_ratio / x
        root = math.hypot(1, z)
        eta = root + math.log(z / (1 + root))
        return x * eta + 1

    # excess rises with x; the bracket holds its zero for every ratio in use.
    a = width_ratio
    x = float(brentq(excess, 1e-9, 1e3 + 10 * score_ratio))  # pyright: ignore[reportArgumentType]
    return (a + x) * math.log(a + x) - a * math.log(a) - x * math.log(x)
