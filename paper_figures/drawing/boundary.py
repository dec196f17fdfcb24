"""The rows of the phase boundary as curves over log2 L: where k* crosses a power of L, where time
breaks even, and the law of the degree behind it.

Heights are log2 of R / ln L everywhere: one axis serves every temperature, and half of it is log2 of
Gamma / sqrt(ln L).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from lora_limits.polynomial import law

Points = list[dict[str, Any]]
TOLERANCES = {"1/L": r"$1/L$", "1%": "1 %"}
BEYOND = 1.6  # the exponent that stands for "more than was measured"


def height(point: dict[str, Any]) -> float:
    """log2 of R / ln L."""
    return math.log2(point["score_ratio"])


def select(points: Points, **where: Any) -> Points:
    """The points whose fields are as said."""
    return [p for p in points if all(p.get(name) == value for name, value in where.items())]


def by_gammas(points: Points) -> list[Points]:
    """The points of the lengths that have the same norms, one list for each set of norms: only some
    cells are measured at the longest.
    """
    norms = {n: frozenset(p["gamma"] for p in select(points, length=n)) for n in _lengths(points)}
    groups = dict.fromkeys(norms.values())
    return [[p for p in points if norms[p["length"]] == group] for group in groups]


def _lengths(points: Points) -> list[int]:
    return sorted({p["length"] for p in points})


def grid(points: Points, tolerance: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log2 L, height, exponent of k*) as arrays over (gamma, L), means over seeds; NaN for a cell
    that is not there, BEYOND where no degree measured was enough.
    """
    lengths = _lengths(points)
    gammas = sorted({p["gamma"] for p in points})
    x, y = np.meshgrid(np.log2(lengths), np.zeros(len(gammas)))
    z = np.full(x.shape, np.nan)
    for j, n in enumerate(lengths):
        for i, gamma in enumerate(gammas):
            y[i, j] = math.log2(gamma**2 / math.log(n))
            here = select(points, length=n, gamma=gamma)
            if here:
                z[i, j] = np.mean([_exponent(p, tolerance) for p in here])
    return x, y, z


def _exponent(point: dict[str, Any], tolerance: str) -> float:
    found = point[tolerance]["exponent"]
    return BEYOND if found is None else min(found, BEYOND)


class Curve(NamedTuple):
    """Heights over log2 L: the mean over seeds, and the lowest and highest of them."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def crossing(
    points: Points, value: Callable[[dict[str, Any]], float], level: float
) -> Curve | None:
    """Where a value that rises with the norm first crosses a level, between two gammas of one length
    and seed; None where it never does. Lengths at which some seed has no crossing are left out.
    """
    found: dict[int, list[float]] = {}
    for n in sorted({p["length"] for p in points}):
        for seed in {p["seed"] for p in points}:
            column = sorted(select(points, length=n, seed=seed), key=height)
            found.setdefault(n, []).append(_first(column, value, level))
    kept = {n: ys for n, ys in found.items() if not np.isnan(ys).any()}
    if not kept:
        return None
    heights = np.array(list(kept.values()))
    return Curve(np.log2(list(kept)), heights.mean(1), heights.min(1), heights.max(1))


def _first(column: Points, value: Callable[[dict[str, Any]], float], level: float) -> float:
    for before, after in itertools.pairwise(column):
        a, b = value(before), value(after)
        if a <= level < b:
            share = (level - a) / (b - a) if math.isfinite(b) else 0.5
            return height(before) + share * (height(after) - height(before))
    return math.nan


def width_crossing(points: Points, tolerance: str, level: float) -> Curve | None:
    """Where log k* / log L crosses a level."""
    return crossing(points, lambda p: _exponent(p, tolerance), level)


class Clock(NamedTuple):
    """Seconds of one slice: of the best exact gradient, and of every degree, at the timed lengths."""

    lengths: np.ndarray  # log2 L
    exact: np.ndarray  # log seconds
    degrees: dict[int, tuple[np.ndarray, np.ndarray]]  # {g: (log2 L, log seconds)}

    def exact_at(self, x: float) -> float:
        """log seconds of the best exact gradient, between the timed lengths."""
        return float(np.interp(x, self.lengths, self.exact))

    def degree_at(self, x: float, degree: int) -> float:
        """log seconds of a degree; inf where it was not timed around there, as its features are
        more than twice the tokens.
        """
        lengths, seconds = self.degrees.get(degree, (np.array([math.inf]), np.array([math.inf])))
        inside = lengths[0] <= x <= lengths[-1]
        return float(np.interp(x, lengths, seconds)) if inside else math.inf

    def covers(self, point: dict[str, Any]) -> bool:
        return self.lengths[0] <= math.log2(point["length"]) <= self.lengths[-1]


def clock(times: Points) -> Clock | None:
    """The times of one slice; None without any."""
    times = sorted(times, key=lambda p: p["length"])
    if not times:
        return None
    x = np.log2([p["length"] for p in times])
    exact = np.log([p["exact"][p["best"]]["seconds"] for p in times])
    degrees = {}
    for g in sorted({int(g) for p in times for g in p["degrees"]}):
        there = [p for p in times if str(g) in p["degrees"]]
        seconds = [p["degrees"][str(g)]["seconds"] for p in there]
        degrees[g] = (np.log2([p["length"] for p in there]), np.log(seconds))
    return Clock(x, exact, degrees)


def slowdown(clock: Clock, tolerance: str) -> Callable[[dict[str, Any]], float]:
    """point -> log of the seconds of the degree it needs over those of the best exact gradient."""

    def value(point: dict[str, Any]) -> float:
        x = math.log2(point["length"])
        degree = point[tolerance]["degree"]
        if degree is None:
            return math.inf
        # a higher degree may not have been timed because it cannot win
        return clock.degree_at(x, max(degree, 1)) - clock.exact_at(x)

    return value


class Pick(NamedTuple):
    """What a user would take: the fastest that meets the tolerance."""

    name: str  # "exact", a degree, or a factor
    seconds: float  # log


def pick(clock: Clock, factors: Points, point: dict[str, Any], tolerance: str) -> Pick:
    """For one cell. factors: "factor" points; of these the nearest length that was run, and the least
    norm that is no smaller, speak for the cell: their errors grow with the norm.
    """
    x = math.log2(point["length"])
    choices = [Pick("exact", clock.exact_at(x))]
    degree = point[tolerance]["degree"]
    if degree is not None:
        choices.append(Pick(str(max(degree, 1)), clock.degree_at(x, max(degree, 1))))
    near = min((abs(math.log2(p["length"]) - x) for p in factors), default=0.0)
    beside = [p for p in factors if abs(math.log2(p["length"]) - x) == near]
    above = sorted((p for p in beside if p["gamma"] >= point["gamma"]), key=lambda p: p["gamma"])
    for name, found in above[0]["factors"].items() if above else ():
        if found["error"] <= tolerance_of(point, tolerance):
            # by its ratio to the exact gradient in its own run, which another length shares
            ratio = math.log(found["seconds"] / above[0]["exact"]["seconds"])
            choices.append(Pick(name, clock.exact_at(x) + ratio))
    return min(choices, key=lambda choice: choice.seconds)


# ---------------------------------------------------------------------------------------- the law


class Law(NamedTuple):
    """c, with rho = c R, of a family: the geometric mean over cells, and the spread of log c."""

    share: float
    spread: float
    cells: Points  # with "predicted" and "measured" exponents, and the length


def tolerance_of(point: dict[str, Any], tolerance: str) -> float:
    return 1 / point["length"] if tolerance == "1/L" else 0.01


def fit(points: Points) -> Law | None:
    """One constant for all cells of a family, both tolerances: the degree that a cell needs is that
    of Taylor's remainder at rho = c R. Cells that degree 0 or 1 serves, or none measured, say
    nothing of c and are left out. None without a cell.
    """
    cells: Points = []
    for p in points:
        for name in TOLERANCES:
            degree = p[name]["real"]
            if degree is not None and degree > 1:
                tolerance = tolerance_of(p, name)
                rho = law.radius_of(degree, tolerance)
                share = rho / p["score_bound"]
                cells.append(p | {"share": share, "eps": tolerance, "at": name})
    if not cells:
        return None
    logs = np.log([p["share"] for p in cells])
    share = float(np.exp(logs.mean()))
    for p in cells:
        degree = law.degree_of(share * p["score_bound"], p["eps"])
        p["measured"] = p[p["at"]]["exponent"]
        p["predicted"] = log_width(p["width"], degree) / math.log(p["length"])
    return Law(share, float(logs.std()), cells)


def log_width(width: float, degree: float) -> float:
    """ln binom(d + g, g), for real degrees."""
    return math.lgamma(width + degree + 1) - math.lgamma(width + 1) - math.lgamma(degree + 1)


def predicted_height(log2_length: float, width: float, eps: float, share: float) -> float:
    """The height at which the law has k* = L."""

    def excess(y: float) -> float:
        radius = share * 2**y * log2_length * math.log(2)
        return log_width(width, law.degree_of(radius, eps)) - log2_length * math.log(2)

    from scipy.optimize import brentq

    return float(brentq(excess, -16.0, 8.0))  # pyright: ignore[reportArgumentType]


def continued(log2_lengths: Iterable[float], share: float, kappa: float) -> list[float]:
    """log k* / log L by the law at d = log2 L, Gamma = kappa sqrt(ln L) and tolerance 1/L."""
    out = []
    for x in log2_lengths:
        log_length = x * math.log(2)
        degree = law.degree_of(share * kappa**2 * log_length, math.exp(-log_length))
        out.append(log_width(x, degree) / log_length)
    return out
