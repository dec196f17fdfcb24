"""Training by exact and by approximate gradients: the loss by the clock, where it ends beside a
margin set beforehand, and what a step costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style
from paper_figures.drawing.statistics import interval
from paper_figures.drawing.training import colours_of, legend, losses
from paper_figures.numbers.finetune import (
    TASKS,
    Runs,
    lengths_of,
    margin,
    over_exact,
    runs,
    steps,
    verdict,
)

__all__ = ["TASKS", "Runs", "draw", "margin", "over_exact", "runs", "steps", "verdict"]

CONFIG = "finetune"


def _places(ax: Axes, labels: list[str]) -> None:
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.5, len(labels) - 0.5)


def _metric(
    ax: Axes, rows: list[dict[str, Any]], cases: list[tuple[str, str]], colours: dict[str, str]
) -> None:
    """Final accuracy under exact attention less that of exact training of the same seed: mean and
    95 % interval, over the margin, shaded.

    A cross at the foot: runs whose loss is no number.
    """
    foot = ax.get_xaxis_transform()
    if any(
        over_exact(runs(rows, *key), method)
        for key in cases
        for method in runs(rows, *key)
        if method != "exact"
    ):
        ax.axhspan(-margin(rows), margin(rows), color=style.GREY, alpha=0.3, linewidth=0)
    for n, (case, task) in enumerate(cases):
        found = runs(rows, case, task)
        exact = [100 * m["final"]["accuracy"] for m in found.get("exact", {}).values()]
        approximate = {method: x for method, x in found.items() if method != "exact"}
        for i, (method, metrics) in enumerate(approximate.items()):
            mean, half = interval(over_exact(found, method))
            x = n + (i - (len(approximate) - 1) / 2) * 0.2
            if not np.isfinite([m["final"]["loss"] for m in metrics.values()]).all():
                ax.plot(x, 0.1, "x", color=colours[method], transform=foot, markersize=4)
                ax.text(x + 0.07, 0.1, "NaN", transform=foot, va="center", size=6)
                continue
            look: dict[str, Any] = {"fmt": "o", "markersize": 2.5, "elinewidth": 0.8}
            ax.errorbar(x, mean, half, color=colours[method], capsize=1.5, **look)
        told = f"{np.mean(exact):.0f} %" if exact else "not run"
        ax.text(n, 0.98, told, transform=foot, ha="center", va="top", size=6)
    ax.axhline(0, color="black", linewidth=0.6)
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.2 * (high - low), high + 0.2 * (high - low))
    ax.set_ylabel("difference (points)")


def _ratios(
    ax: Axes, rows: list[dict[str, Any]], cases: list[tuple[str, str]], colours: dict[str, str]
) -> None:
    """How many times less time (filled) and temporary memory (open) a step takes than the fastest
    exact one.
    """
    for n, (case, task) in enumerate(cases):
        found = steps(rows, case, task)
        methods = [m for m in runs(rows, case, task) if m != "exact" and m in found]
        for i, method in enumerate(methods):
            x = n + (i - (len(methods) - 1) / 2) * 0.22
            for quantity, fill in (("seconds", "full"), ("temporary", "none")):
                ratio = found["exact"][quantity] / found[method][quantity]
                ax.plot(x, ratio, "o", color=colours[method], fillstyle=fill, markersize=3)
    ax.axhline(1, color="black", linewidth=0.6)
    ax.set_yscale("log")
    style.round_ticks(ax.yaxis)
    ax.set_ylabel("times less")
    for fill, label in (("full", "time"), ("none", "memory")):
        ax.plot([], [], "ko", fillstyle=fill, markersize=3, label=label)
    ax.legend(loc="upper left", handletextpad=0.1, borderaxespad=0.1)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) loss by the clock on the long task, mean of the seeds; (b) time and memory of a step; (c)
    final accuracy over exact training's, 95 % bars over the margin, shaded.

    finetune_curves has the other tasks' curves.
    """
    lengths = lengths_of(rows, "short") | lengths_of(rows, "long")
    colours = colours_of(rows)
    fig, axes = style.figure(4.4)
    axes[0, 0].remove()
    grid = fig.add_gridspec(2, 2, width_ratios=(1, 1.1))
    by_clock, cost, metric = (
        fig.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :])
    )
    long = list(lengths_of(rows, "long"))[:1]
    for case, task in long:
        losses(by_clock, runs(rows, case, task), colours, steps(rows, case, task))
        by_clock.set_xscale("log")
        style.panel(by_clock, "a", f"{TASKS[task]}, $L = {lengths[case, task]}$")
    if not long:
        style.empty(by_clock)
        style.panel(by_clock, "a", "long task")
    by_clock.set_ylabel("training loss")
    labels = [f"{TASKS[task]}\n$L = {length}$" for (_, task), length in lengths.items()]
    _metric(metric, rows, list(lengths), colours)
    style.panel(metric, "c", "final accuracy beside exact training's; shaded: the margin")
    _ratios(cost, rows, list(lengths), colours)
    style.panel(cost, "b", "a step, over exact's")
    for ax in (metric, cost):
        _places(ax, labels)
    cost.tick_params(axis="x", labelsize=6)
    legend(fig, colours)
    return fig
