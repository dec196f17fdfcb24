"""Numbers with their uncertainty: means over seeds, exponents over L, where two curves cross."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval; the half-width is 0 for one value, and both are
    NaN for none.
    """
    values = np.asarray(list(values), float)
    if len(values) == 0:
        return np.nan, np.nan
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def exponent(
    lengths: Sequence[float], values: Sequence[float], least: int = 2048
) -> tuple[float, float] | None:
    """Slope of log value against log L over L >= least (all, if fewer than three), with its 95 %
    half-width; None for fewer than three.
    """
    x = np.log(np.asarray(lengths, float))
    y = np.log(np.asarray(values, float))
    keep = np.asarray(lengths) >= least
    if keep.sum() < 3:
        keep[:] = True
    if keep.sum() < 3:
        return None
    fit: Any = stats.linregress(x[keep], y[keep])
    return float(fit.slope), float(stats.t.ppf(0.975, keep.sum() - 2) * fit.stderr)


def crossover(
    lengths: Sequence[float], slow: Sequence[float], fast: Sequence[float]
) -> float | None:
    """The length from which `slow` takes longer than `fast`, by log-log interpolation; None if it
    lies outside.
    """
    x = np.log(np.asarray(lengths, float))
    gap = np.log(np.asarray(slow, float) / np.asarray(fast, float))
    below = np.flatnonzero(gap <= 0)
    if len(below) == 0 or below[-1] == len(x) - 1:
        return None
    i = below[-1]
    return float(np.exp(x[i] - gap[i] * (x[i + 1] - x[i]) / (gap[i + 1] - gap[i])))
