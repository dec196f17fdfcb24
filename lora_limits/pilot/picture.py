"""A pilot as a picture: loss by steps and by seconds, error against noise, the difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_limits.pilot.outcome import LEVEL, STOP

FILE = "pilot.png"
COLOURS = {"exact": "#0072B2", "approximate": "#D55E00"}  # told apart by the colour-blind


def save(state: Mapping[str, Any], out: Path) -> Path:
    """Draws a pilot whose sides were run; returns the path of the picture."""
    fig = Figure(figsize=(8.0, 5.4), layout="constrained")
    axes = fig.subplots(2, 2)
    draw(axes.ravel(), state)
    path = out / FILE
    fig.savefig(path, dpi=160)
    return path


def draw(axes: Any, state: Mapping[str, Any]) -> None:
    """The four panels."""
    by_steps, by_seconds, watched, difference = axes
    for side, colour in COLOURS.items():
        for run in (run for run in state["runs"] if run["side"] == side):
            label = side if run["seed"] == 0 else None
            line = "-" if side == "exact" else "--"
            style: dict[str, Any] = {"color": colour, "label": label, "linestyle": line}
            style["linewidth"] = 1.0
            steps = np.asarray(run["steps"])
            spent = np.concatenate([[0.0], np.cumsum(run["seconds"])])[steps]
            by_steps.plot(np.arange(1, len(run["loss"]) + 1), run["loss"], alpha=0.7, **style)
            by_seconds.plot(spent, run["test_loss"], marker="o", markersize=3, **style)
            if side == "approximate":
                _watched(watched, run, colour)
    by_steps.set(xlabel="step", ylabel="training loss")
    by_seconds.set(xlabel="seconds of steps", ylabel="held-out loss")
    watched.set(xlabel="step", ylabel="relative to the gradient", yscale="log")
    _difference(difference, state)
    for n, ax in enumerate(axes):
        ax.set_title(f"({'abcd'[n]})", loc="left", fontsize=9)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)


def _watched(ax: Axes, run: Mapping[str, Any], colour: str) -> None:
    first = run["seed"] == 0
    noise = np.asarray(run["noise"])
    label = "error of its gradient" if first else None
    ax.plot(run["steps"], run["error"], "o-", markersize=3, color=colour, label=label)
    told = "noise of a batch: stop at or above" if first else None
    ax.plot(run["steps"], STOP * noise, "--", color="0.4", linewidth=1.0, label=told)


def _difference(ax: Axes, state: Mapping[str, Any]) -> None:
    """How much worse the approximate side ends, beside the margin."""
    outcome, margin = state["outcome"], state["asked"]["margin"]
    metric, sign = outcome["metric"], 1 if outcome["metric"] == "loss" else -1
    finals = {
        side: [np.mean(run["final"][metric]) for run in state["runs"] if run["side"] == side]
        for side in COLOURS
    }
    each = sign * (np.asarray(finals["approximate"]) - np.asarray(finals["exact"]))
    worse = outcome["worse"]
    ax.axvspan(-margin, margin, color="0.88", label="margin")
    ax.axvline(0.0, color="0.6", linewidth=0.8)
    ax.plot(each, np.zeros(len(each)) + 0.25, "|", color="0.3", markersize=12, label="seeds")
    if np.isfinite([worse["low"], worse["high"]]).all():
        spread = [[worse["mean"] - worse["low"]], [worse["high"] - worse["mean"]]]
        label = f"mean, {LEVEL:.0%} interval"
        ax.errorbar(
            [worse["mean"]], [0.0], xerr=spread, fmt="o", capsize=4, label=label,
            color=COLOURS["approximate"],
        )  # fmt: skip
    ax.set(ylim=(-0.6, 1.2), yticks=[], xlabel=f"held-out {metric}, worse than exact by")
