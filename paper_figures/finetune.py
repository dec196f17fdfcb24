"""Training by exact and by approximate gradients: loss, gradient error, final metric, time and
memory.
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


def _losses(ax: Axes, found: Runs, colours: dict[str, str], seconds=None) -> None:
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


def _errors(ax: Axes, found: Runs, colours: dict[str, str]) -> None:
    """Median over seeds of the gradient's relative error (solid) and of 1 - cosine (dotted), along
    training.
    """
    for method, by_seed in found.items():
        metrics = list(by_seed.values())
        if "error" in metrics[0]:
            x = metrics[0]["steps"]
            error = np.median([m["error"] for m in metrics], axis=0)
            away = 1 - np.median([m["cosine"] for m in metrics], axis=0)
            ax.plot(x, error, "o-", color=colours[method], markersize=2, linewidth=0.9)
            ax.plot(
                x, np.maximum(away, 1e-7), "o:", color=colours[method], markersize=2, linewidth=0.9
            )
    ax.set_yscale("log")
    ax.set_ylim(3e-8, 2)
    ax.set_yticks([1e-6, 1e-4, 1e-2, 1])
    ax.minorticks_off()
    ax.set_xlabel("step")


def _places(ax: Axes, labels: list[str]) -> None:
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.5, len(labels) - 0.5)


def _metric(
    ax: Axes, rows: list[dict[str, Any]], cases: list[tuple[str, str]], colours: dict[str, str]
) -> None:
    """Final accuracy under exact attention less that of exact training of the same seed: mean and
    95 % interval.

    A cross at the foot: runs whose loss is no number.
    """
    foot = ax.get_xaxis_transform()
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
    """Short tasks: (a-d) loss, (e-h) gradient error; long one: (i, j) loss, (k) error; all: (l)
    metric, (m) cost.

    Gradient error: relative Frobenius (solid) and 1 - cosine (dotted).
    """
    lengths = {(r["point"]["case"], r["point"]["task"]): r["point"]["length"] for r in rows}
    short = [c for c in lengths if c[0] == "short"][:4]
    long = [c for c in lengths if c[0] == "long"][:1]
    methods = sorted({r["point"]["method"] for r in rows if r["point"]["kind"] == "run"})
    approximate = [m for m in methods if m != "exact"]
    # One colour a method in all panels; exact training is black.
    colours = {"exact": "black"} | {m: style.COLOURS[n] for n, m in enumerate(approximate)}
    fig, axes = style.figure(6.4)
    axes[0, 0].remove()
    grid = fig.add_gridspec(4, 1)
    parts = [grid[n].subgridspec(1, columns) for n, columns in enumerate((4, 4, 3, 2))]
    letters = iter("abcdefghijklm")
    painters = (_losses, "training loss"), (_errors, "error; $1 - $cos dotted")
    for row, (paint, label) in enumerate(painters):
        for n, key in enumerate(short):
            ax = fig.add_subplot(parts[row][n])
            paint(ax, runs(rows, *key), colours)
            style.panel(ax, next(letters), TASKS[key[1]].replace("\n", " ") if row == 0 else "")
            if n == 0:
                ax.set_ylabel(label)
    third = [fig.add_subplot(parts[2][n]) for n in range(3)]
    name = "long"
    for key in long:
        _long(third, runs(rows, *key), colours, steps(rows, *key))
        name = f"{TASKS[key[1]]}, $L = {lengths[key]}$".replace("\n", " ")
    for ax in [] if long else third:
        style.empty(ax)
    for ax, what in zip(third, (name, "the same by time", "its gradient"), strict=True):
        style.panel(ax, next(letters), what)
    labels = [f"{TASKS[task]}\n$L = {lengths[case, task]}$" for case, task in (*short, *long)]
    titles = "final accuracy beside exact training", "time and memory of a step"
    for n, paint in enumerate((_metric, _ratios)):
        ax = fig.add_subplot(parts[3][n])
        paint(ax, rows, [*short, *long], colours)
        _places(ax, labels)
        style.panel(ax, next(letters), titles[n])
    wide: dict[str, Any] = {"linewidth": 2.6, "alpha": 0.35}
    handles = [Line2D([], [], color=colours[m], **(wide if m == "exact" else {})) for m in methods]
    if methods:
        fig.legend(handles, methods, loc="outside upper center", ncols=len(methods))
    return fig


def _long(axes: list[Axes], found: Runs, colours: dict[str, str], seconds: Any) -> None:
    """Loss by step and by the clock, and gradient error, of the long task: there approximate steps
    are the faster ones.
    """
    _losses(axes[0], found, colours)
    _losses(axes[1], found, colours, seconds)
    axes[1].set_xscale("log")
    _errors(axes[2], found, colours)
    axes[0].set_ylabel("training loss")
    axes[2].set_ylabel("gradient error")
