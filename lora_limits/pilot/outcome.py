"""Go or no-go: is the approximate side no worse than the exact one by the margin, and faster?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from lora_limits.pilot.settings import Settings

LEVEL = 0.9  # of the interval: either of its ends is a test at 5 %
STOP = 1.0  # error over noise, from which on the estimate says stop


class Interval(NamedTuple):
    """A mean and the interval about it."""

    mean: float
    low: float
    high: float


def interval(differences: Float[np.ndarray, "seeds windows"]) -> Interval:
    """The mean over seeds and held-out windows, both of them a sample.

    Variance of the mean: that between seeds plus that between windows, each over its number;
    Student's t with Satterthwaite's degrees of freedom. Of one seed, what differs between seeds is
    left out.
    """
    mean = float(differences.mean())
    parts = []
    for axis in (0, 1):
        count = differences.shape[axis]
        if count > 1:
            each = differences.mean(1 - axis)
            parts.append((float(each.var(ddof=1)) / count, count - 1))
    variance = sum(part for part, _ in parts)
    if not parts or not math.isfinite(variance):
        return Interval(mean, -math.inf, math.inf)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def stopped(run: Mapping[str, Any]) -> int | None:
    """The step at which a run's error was no longer below the noise, or was no number."""
    watched = zip(run["steps"], run["error"], run["noise"], strict=True)
    return next((step for step, error, noise in watched if not error < STOP * noise), None)


def judge(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What a finished pilot says, all JSON: "go", the "reason", and the numbers of both sides.

    "worse": the interval of how much worse the approximate side ends, in the metric's own unit.
    """
    if "runs" not in state:
        return {
            "go": False,
            "reason": "in no layer is a method both faster and well below the noise",
        }
    metric = "loss" if state["classes"] is None else "accuracy"
    sign = 1 if metric == "loss" else -1
    exact, other = (_of(state["runs"], side) for side in ("exact", "approximate"))
    final = [np.asarray([run["final"][metric] for run in runs]) for runs in (exact, other)]
    worse = interval(sign * (final[1] - final[0]))
    start = state["start"][metric]
    gain = sign * (start - float(final[0].mean()))
    times = state["times"]
    stops = [stop for stop in map(stopped, other) if stop is not None]
    told = {
        "metric": metric,
        "start": start,
        "exact": float(final[0].mean()),
        "approximate": float(final[1].mean()),
        "worse": worse._asdict(),
        "gain": gain,
        "speedup": times["exact"]["seconds"] / times["approximate"]["seconds"],
        "stop": min(stops, default=None),
    }
    reason = _against(worse, gain, times, settings)
    if reason is None:
        return told | {"go": True, "reason": "no worse by the margin, and faster"}
    return told | {"go": False, "reason": reason}


def _of(runs: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    return sorted((run for run in runs if run["side"] == side), key=lambda run: run["seed"])


def _against(
    worse: Interval, gain: float, times: Mapping[str, Any], settings: Settings
) -> str | None:
    """The first reason against, or None."""
    margin = settings.margin
    fast, slow = times["approximate"], times["exact"]
    # Half the spread on either side: the quartiles do not meet.
    clear = fast["seconds"] + fast["spread"] / 2 < slow["seconds"] - slow["spread"] / 2
    if not math.isfinite(worse.mean):
        return "the approximate side ends in no number"
    if worse.low > margin:
        return "the approximate side is worse by more than the margin"
    if gain <= margin:
        return "exact training gains less than the margin: more steps or a larger rate"
    if settings.seeds < 2:
        return "one seed shows nothing of the next: run 3 (--seeds 3)"
    if worse.high > margin:
        return "a loss below the margin is not shown: more seeds or held-out text"
    return None if clear else "a step is not faster"
