"""Training losses of exact and approximate methods, one colour a method."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

SMOOTH = 5  # steps in a running mean of the training loss


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over SMOOTH steps, shorter at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - SMOOTH, 0)
    return (sums[last] - sums[first]) / (last - first)


def losses(
    ax: Axes, found: dict[str, dict[int, dict[str, Any]]], colours: dict[str, str], seconds=None
) -> None:
    """The mean loss over seeds by step, or by the seconds that steps of each method take; exact
    wide and pale.
    """
    timed = {m: x for m, x in found.items() if seconds is None or m in seconds}
    if not timed:
        style.empty(ax)
    for method, metrics in timed.items():
        loss = smooth(np.mean([m["loss"] for m in metrics.values()], axis=0))
        x = np.arange(1, len(loss) + 1) * (seconds[method]["seconds"] if seconds else 1)
        width, alpha = (2.6, 0.35) if method == "exact" else (0.9, 1)
        ax.plot(x, loss, color=colours[method], linewidth=width, alpha=alpha)
    ax.set_xlabel("seconds" if seconds else "step")


def colours_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """One colour a method in all panels; exact training is black."""
    methods = sorted({r["point"]["method"] for r in rows if r["point"]["kind"] == "run"})
    approximate = [m for m in methods if m != "exact"]
    return {"exact": "black"} | {m: style.COLOURS[n] for n, m in enumerate(approximate)}


def legend(fig: Figure, colours: dict[str, str]) -> None:
    """The methods, above all panels; exact is wide and pale."""
    wide: dict[str, Any] = {"linewidth": 2.6, "alpha": 0.35}
    handles = [
        Line2D([], [], color=colour, **(wide if method == "exact" else {}))
        for method, colour in colours.items()
    ]
    fig.legend(handles, list(colours), loc="outside upper center", ncols=len(colours))
