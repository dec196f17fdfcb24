"""Numbers as words: as many digits as mean something, a spread beside what was timed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lora_limits.instruments import timing

Rows = list[dict[str, Any]]
Line = tuple[str, str]


def plain(value: float, digits: int = 2) -> str:
    """The value to so many significant digits, in figures from 1e-3 to 1e7: 0.11, 56, 12,900."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    place = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, place)
    return f"{rounded:,.{max(place, 0)}f}"


def spread(mean: float, half: float, unit: str = "") -> str:
    """mean ± half, to the place of the half's first digit, or second where that is 1 or 2."""
    if half > 0:
        first = math.floor(math.log10(half))
        place = max(-first + (half < 3 * 10.0**first), 0)
    else:
        place = 2
    # + 0.0: no minus before a zero
    return f"{round(mean, place) + 0.0:.{place}f} ± {half:.{place}f}{unit}"


def times(slow: dict[str, Any], fast: dict[str, Any]) -> str:
    """How many times as fast, from two timings with "seconds", "spread" and "repeats".

    The median and half the interquartile range of the ratios round by round, where the rows have
    rounds. Else the ratio of the medians, with the sum of half the relative interquartile ranges of
    both. Of a single round there is no spread.
    """
    ratio = slow["seconds"] / fast["seconds"]
    if min(slow["repeats"], fast["repeats"]) == 1:
        return f"{plain(ratio)} times (one timed round)"
    if "rounds" in slow and "rounds" in fast:
        return f"{spread(*timing.ratio(slow, fast))} times"
    half = ratio * sum(timed["spread"] / timed["seconds"] for timed in (slow, fast)) / 2
    return f"{spread(ratio, half)} times"


def span(values: Iterable[float], digits: int = 2) -> str:
    """lowest to highest."""
    values = list(values)
    return f"{plain(min(values), digits)} to {plain(max(values), digits)}"


def over_seeds(metrics: dict[str, Any], name: str) -> str:
    """What was measured of several problems: lowest to highest, or the one where they look alike."""
    low, high = (plain(float(end(metrics["by_seed"][name]))) for end in (np.min, np.max))
    return low if low == high else f"{low} to {high}"


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


def points(rows: Rows, **where: Any) -> Rows:
    """Points and metrics of the rows whose point is as said, as one dictionary each."""
    return [
        row["point"] | row["metrics"]
        for row in rows
        if all(row["point"].get(name) == value for name, value in where.items())
    ]
