"""Pilots of real models and of a small one made here: how much worse approximate training ends, how
much faster its steps are, and its gradient's error along the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style

CONFIG = "pilot"
MODELS = {"made": "made here", "minilm": "MiniLM", "smollm2": "SmolLM2"}

Pilots = dict[str, dict[str, Any]]


def trained(rows: list[dict[str, Any]]) -> Pilots:
    """{pilot: its row}, of those whose two sides differ; where exact was chosen nothing was run."""
    found = {row["point"]["pilot"]: row for row in rows if "runs" in row["metrics"]}
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, int]:
    model, length, _ = name.split(maxsplit=2)
    return list(MODELS).index(model), int(length)


def label(name: str) -> str:
    """A pilot's name as a reader has it."""
    model, length, method = name.split(maxsplit=2)
    return f"{MODELS[model]}, {int(length):,}: {method}"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) how much worse the approximate side ends over the margin, both held out under exact
    attention: mean, 90 % interval and seeds. (b) how many times as fast a step is, with the
    quartiles of both sides. (c) error of the gradient over the noise of a batch along training, all
    seeds; the estimate says stop at 1. (d) held-out loss by a side's own methods over its start,
    against the time of its steps over that of exact training's: exact, dashed, and approximate.
    """
    pilots = trained(rows)
    fig, axes = style.figure(4.4, 2, 2)
    _worse(axes[0, 0], pilots)
    _faster(axes[0, 1], pilots)
    _error(axes[1, 0], pilots)
    _loss(axes[1, 1], pilots)
    return fig


def _colours(pilots: Pilots) -> dict[str, str]:
    return {name: style.COLOURS[n % len(style.COLOURS)] for n, name in enumerate(pilots)}


def _worse(ax: Axes, pilots: Pilots) -> None:
    style.panel(ax, "a", "worse than exact, over the margin")
    for place, (name, colour) in enumerate(_colours(pilots).items()):
        margin = pilots[name]["fields"]["margin"]
        worse = pilots[name]["metrics"]["outcome"]["worse"]
        each = _differences(pilots[name]["metrics"]) / margin
        ax.plot(each, np.full(len(each), place - 0.25), "|", color=colour, markersize=5)
        span = [worse["mean"] - worse["low"], worse["high"] - worse["mean"]]
        spread = np.asarray(span, float).reshape(2, 1) / margin
        if np.isfinite(spread).all():
            at = worse["mean"] / margin
            ax.errorbar([at], [place], xerr=spread, fmt="o", color=colour, capsize=2)
    ax.axvspan(-1, 1, color="0.92", zorder=0)
    ax.axvline(0, color="0.6", linewidth=0.6, zorder=1)
    # Linear within the margin, logarithmic beyond: a failed pilot is thousands of margins off.
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    ax.set_yticks(range(len(pilots)), [label(name) for name in pilots])
    ax.set_ylim(len(pilots) - 0.5, -0.6)
    ax.tick_params(axis="y", labelsize=6, length=0)


def _differences(metrics: dict[str, Any]) -> np.ndarray:
    """How much worse the approximate side ends, by seed."""
    metric = metrics["outcome"]["metric"]
    sides = (
        [np.mean(run["final"][metric]) for run in metrics["runs"] if run["side"] == side]
        for side in ("exact", "approximate")
    )
    exact, other = (np.asarray(side) for side in sides)
    return (other - exact) * (1 if metric == "loss" else -1)


def _faster(ax: Axes, pilots: Pilots) -> None:
    style.panel(ax, "b", "exact's time of a step over its own")
    for place, (name, colour) in enumerate(_colours(pilots).items()):
        exact, other = (pilots[name]["metrics"]["times"][s] for s in ("exact", "approximate"))
        ratio = exact["seconds"] / other["seconds"]
        low = (exact["seconds"] - exact["spread"] / 2) / (other["seconds"] + other["spread"] / 2)
        high = (exact["seconds"] + exact["spread"] / 2) / (other["seconds"] - other["spread"] / 2)
        spread = [[ratio - low], [high - ratio]]
        ax.errorbar([ratio], [place], xerr=spread, fmt="o", color=colour, capsize=2)
        verdict = "go" if pilots[name]["metrics"]["outcome"]["go"] else "no-go"
        ax.annotate(
            verdict, (ratio, place), (0, 4), textcoords="offset points", fontsize=6, ha="center"
        )
    ax.axvline(1, color="0.6", linewidth=0.6)
    ax.set_xscale("log")
    style.round_ticks(ax.xaxis)
    ax.set_yticks([])
    ax.set_ylim(len(pilots) - 0.5, -0.6)


def _error(ax: Axes, pilots: Pilots) -> None:
    style.panel(ax, "c", "error of the gradient over noise")
    for name, colour in _colours(pilots).items():
        for run in pilots[name]["metrics"]["runs"]:
            if run["side"] == "approximate":
                ratio = np.asarray(run["error"], float) / np.asarray(run["noise"], float)
                share = np.asarray(run["steps"]) / max(run["steps"])
                ax.plot(share, ratio, "o-", color=colour, markersize=2, linewidth=0.8)
    ax.axhline(1, color="0.4", linestyle="--", linewidth=0.8)
    ax.set_yscale("log")
    style.round_ticks(ax.yaxis)
    ax.set_xlabel("share of the steps")


def _loss(ax: Axes, pilots: Pilots) -> None:
    style.panel(ax, "d", "held-out loss, own methods")
    for name, colour in _colours(pilots).items():
        runs, times = (pilots[name]["metrics"][part] for part in ("runs", "times"))
        for run in runs:
            # By the step as it was timed, both sides by turns: runs may have had company.
            ratio = times[run["side"]]["seconds"] / times["exact"]["seconds"]
            spent = np.asarray(run["steps"]) / max(run["steps"]) * ratio
            loss = np.asarray(run["test_loss"], float)
            line = "--" if run["side"] == "exact" else "-"
            ax.plot(spent, loss / loss[0], line, color=colour, linewidth=0.8)
    ax.set_xlabel("time of the steps over exact training's")
