"""Training by exact and by approximate gradients: the loss by the clock, where it ends beside a
margin set beforehand, and what a step costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.drawing.statistics import interval

CONFIG = "finetune"
TASKS = {
    "digits": "digits",
    "prose_or_code": "prose\nor code",
    "which_module": "which\nmodule",
    "next_byte": "next\nbyte",
}
Runs = dict[str, dict[int, dict[str, Any]]]
SMOOTH = 5  # steps in a running mean of the training loss


def runs(rows: list[dict[str, Any]], case: str, task: str) -> Runs:
    """{method: {seed: metrics of its run}} in the order of the rows."""
    out: Runs = {}
    for row in rows:
        point = row["point"]
        if (point["kind"], point["case"], point["task"]) == ("run", case, task):
            out.setdefault(point["method"], {})[point["seed"]] = row["metrics"]
    return out


def over_exact(found: Runs, method: str) -> list[float]:
    """Points of accuracy over exact training's, seed by seed, of the seeds that both were run with:
    they start from the same base and see the same data.
    """
    exact = found.get("exact", {})
    return [
        100 * own["final"]["accuracy"] - 100 * exact[seed]["final"]["accuracy"]
        for seed, own in found[method].items()
        if seed in exact
    ]


def steps(rows: list[dict[str, Any]], case: str, task: str) -> dict[str, dict[str, float]]:
    """{method: seconds and temporary bytes of a step}, "exact" being the fastest exact
    contender.
    """
    for row in rows:
        point = row["point"]
        metrics = row["metrics"]
        if (point["kind"], point["case"], point["task"]) == ("time", case, task):
            return metrics["methods"] | {"exact": metrics["methods"][metrics["best"]]}
    return {}


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over SMOOTH steps, shorter at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - SMOOTH, 0)
    return (sums[last] - sums[first]) / (last - first)


def losses(ax: Axes, found: Runs, colours: dict[str, str], seconds=None) -> None:
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


def _places(ax: Axes, labels: list[str]) -> None:
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.5, len(labels) - 0.5)


def margin(rows: list[dict[str, Any]]) -> float:
    """Points of accuracy within which training counts as equivalent, set before it ran."""
    return 100 * rows[0]["fields"]["margin"]


def verdict(rows: list[dict[str, Any]], differences: list[float]) -> str:
    """Whether the 95 % interval of the differences lies within the margin, or beyond it."""
    most = margin(rows)
    mean, half = interval(differences)
    if not np.isfinite(mean):
        return "beyond"
    if len(differences) < 2:
        half = np.inf  # one seed shows nothing of the next
    if mean + half < -most or mean - half > most:
        return "beyond"
    within = -most < mean - half and mean + half < most
    return "within" if within else "not shown to be within"


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


def colours_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """One colour a method in all panels; exact training is black."""
    methods = sorted({r["point"]["method"] for r in rows if r["point"]["kind"] == "run"})
    approximate = [m for m in methods if m != "exact"]
    return {"exact": "black"} | {m: style.COLOURS[n] for n, m in enumerate(approximate)}


def lengths_of(rows: list[dict[str, Any]], case: str) -> dict[tuple[str, str], int]:
    """{(case, task): L} of the short or the long tasks."""
    return {
        (case, row["point"]["task"]): row["point"]["length"]
        for row in rows
        if row["point"]["case"] == case
    }


def legend(fig: Figure, colours: dict[str, str]) -> None:
    """The methods, above all panels; exact is wide and pale."""
    wide: dict[str, Any] = {"linewidth": 2.6, "alpha": 0.35}
    handles = [
        Line2D([], [], color=colour, **(wide if method == "exact" else {}))
        for method, colour in colours.items()
    ]
    fig.legend(handles, list(colours), loc="outside upper center", ncols=len(colours))


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
