"""What became of the problems of an attack: error over bound, counted."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Tally:
    """What became of the problems of one family."""

    problems: int = 0
    finite: int = 0
    worst: float = 0.0  # the largest error / bound
    broken: list = dataclasses.field(default_factory=list)  # descriptions

    def add(self, ratio, finite, describe):
        self.problems += 1
        self.finite += bool(finite)
        self.worst = max(self.worst, ratio)
        if not ratio <= 1:
            self.broken.append((ratio, describe))

    def __str__(self):
        said = f"{self.problems:6d} problems, {self.finite:6d} finite, error / bound at most {self.worst:.3g}"
        return said + "".join(f"\n    BROKEN {r:.3g} {d}" for r, d in self.broken[:5])


def ratios(result, want):
    """(n,) the largest error / bound of each problem over arrays with a finite bound; (n,) whether
    all are finite.
    """
    worst, finite = 0.0, True
    for name, pair in want.items():
        for half, exact in zip("ab", pair, strict=True):
            got = np.asarray(getattr(result.gradient[name], half)).astype(np.longdouble)
            bound = np.asarray(getattr(result.bound[name], half)).astype(np.longdouble)
            known = np.isfinite(exact).all((1, 2))  # else the reference itself has overflowed
            with np.errstate(invalid="ignore", divide="ignore"):
                error = np.abs(got - exact).max((1, 2))
                ratio = np.where(error == 0, 0, error / bound)
            ratio = np.where(np.isnan(error) | np.isnan(bound), np.inf, ratio)
            ratio = np.where(np.isinf(bound) | ~known, 0, ratio)
            worst = np.maximum(worst, ratio.astype(float))
            finite = finite & np.isfinite(bound)
    return np.asarray(worst), np.asarray(finite)
