"""What each task loses as the features become few, the error of the gradient beside it, and who
minds most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.drawing.statistics import interval
from paper_figures.drawing.tables import markdown

CONFIG = "sensitivity"
LOOKS = {
    "digits": (style.COLOURS[0], "o"),
    "prose_or_code": (style.COLOURS[2], "s"),
    "which_module": (style.COLOURS[1], "^"),
    "next_byte": (style.COLOURS[3], "D"),
}


def runs_of(rows: list[dict[str, Any]], task: str, method: str) -> dict[int, dict[str, Any]]:
    """{seed: metrics} of one method on one task."""
    mine = [row for row in rows if (row["point"]["task"], row["point"]["method"]) == (task, method)]
    return {row["point"]["seed"]: row["metrics"] for row in mine}


def methods_of(rows: list[dict[str, Any]], task: str, kind: str) -> list[str]:
    """The methods of a kind that a task was run with, fewest features first."""
    found = {
        row["point"]["method"]: row["metrics"]["features"]
        for row in rows
        if row["point"]["task"] == task
    }
    return sorted((name for name in found if name.startswith(kind)), key=lambda name: found[name])


def failed(rows: list[dict[str, Any]], task: str, method: str) -> int:
    """How many runs met a loss that is not finite."""
    return sum(not metrics["finite"] for metrics in runs_of(rows, task, method).values())


def drops(rows: list[dict[str, Any]], task: str, method: str, way: str = "own") -> np.ndarray:
    """Points of accuracy below exact training, seed by seed; by the method itself ("own") or by
    exact attention.
    """
    exact = runs_of(rows, task, "exact")
    mine = {s: m for s, m in runs_of(rows, task, method).items() if s in exact}
    return np.array(
        [100 * (exact[s]["own"]["accuracy"] - m[way]["accuracy"]) for s, m in mine.items()]
    )


def gain(rows: list[dict[str, Any]], task: str) -> float:
    """Points of accuracy that exact fine-tuning adds, the mean over seeds."""
    exact = runs_of(rows, task, "exact").values()
    return interval(100 * (m["own"]["accuracy"] - m["before"]["accuracy"]) for m in exact)[0]


def common(rows: list[dict[str, Any]]) -> list[str]:
    """The polynomials that every task was run with as often as exactly, and that no run of any task
    failed with.
    """
    tasks = tasks_of(rows)
    full = {t: len(runs_of(rows, t, "exact")) for t in tasks}
    every = methods_of(rows, tasks[0], "polynomial")
    return [
        m
        for m in every
        if all(len(runs_of(rows, t, m)) == full[t] and not failed(rows, t, m) for t in tasks)
    ]


def tasks_of(rows: list[dict[str, Any]]) -> list[str]:
    present = {row["point"]["task"] for row in rows}
    return [task for task in LOOKS if task in present]


def lost(rows: list[dict[str, Any]], task: str) -> tuple[float, float]:
    """Points of accuracy that are lost, the mean over `common` methods: mean and half a 95 %
    interval over seeds.
    """
    exact = runs_of(rows, task, "exact")
    each = [runs_of(rows, task, name) for name in common(rows)]
    # A mean over methods is of the seeds that all of them were run with.
    seeds = [seed for seed in exact if each and all(seed in own for own in each)]
    fallen = [
        [exact[s]["own"]["accuracy"] - own[s]["own"]["accuracy"] for own in each] for s in seeds
    ]
    return interval(100 * float(np.mean(of_seed)) for of_seed in fallen)


def ranked(rows: list[dict[str, Any]]) -> list[str]:
    """The tasks, those that lose most first."""
    return sorted(tasks_of(rows), key=lambda task: -lost(rows, task)[0])


def _against_features(ax: Axes, rows: list[dict[str, Any]], quantity: str) -> None:
    """Polynomials (full, joined) and skeletons (hollow) by k; crosses at the top: runs that
    failed.
    """
    for n, task in enumerate(tasks_of(rows)):
        colour, marker = LOOKS[task]
        for kind, fill, line in (("polynomial", "full", "-"), ("skeleton", "none", "none")):
            names = [m for m in methods_of(rows, task, kind) if not failed(rows, task, m)]
            look: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 3,
                "linestyle": line,
            }
            # Runs that failed have no error to draw; they are crosses below.
            found = [_values(rows, task, name, quantity) for name in names]
            k = [
                next(iter(runs_of(rows, task, name).values()))["features"] * 1.06 ** (n - 1.5)
                for name in names
            ]
            if found:
                middle, *bars = zip(*found, strict=True)
                ax.errorbar(k, middle, bars, fillstyle=fill, linewidth=0.8, elinewidth=0.5, **look)
        for name in methods_of(rows, task, "polynomial"):
            if failed(rows, task, name):
                k = next(iter(runs_of(rows, task, name).values()))["features"] * 1.06 ** (n - 1.5)
                ax.plot(
                    k,
                    0.97,
                    "x",
                    color=colour,
                    markersize=4,
                    transform=ax.get_xaxis_transform(),
                    clip_on=False,
                )
    ax.set_xscale("log")
    # Labels only where they do not run into one another.
    every = sorted({row["metrics"]["features"] for row in rows} - {None})
    ax.set_xticks([k for k in every if k in (1, 5, 15, 35, 70, 210) or len(every) < 4])
    ax.set_xticklabels([str(int(t)) for t in ax.get_xticks()])
    ax.minorticks_off()
    ax.set_xlabel("features $k$")


def _values(
    rows: list[dict[str, Any]], task: str, name: str, quantity: str
) -> tuple[float, float, float]:
    """Middle and how far its bar goes down and up: a 95 % interval of the drop, or all seeds'
    errors.
    """
    if quantity == "drop":
        mean, half = interval(drops(rows, task, name))
        return mean, half, half
    errors = [
        metrics["gradient"]["after"]["method"]["relative"]
        for metrics in runs_of(rows, task, name).values()
    ]
    middle = float(np.exp(np.mean(np.log(errors))))
    return middle, max(middle - min(errors), 0.0), max(max(errors) - middle, 0.0)


def _ranking(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Points lost, tasks that mind most on top, each with what fine-tuning gains; shaded: the
    margin.
    """
    order = ranked(rows)[::-1]
    margin = 100 * rows[0]["fields"]["margin"]
    if np.isfinite([lost(rows, task)[0] for task in order]).any():
        ax.axvspan(-margin, margin, color=style.GREY, alpha=0.3, linewidth=0)
    for y, task in enumerate(order):
        colour, marker = LOOKS[task]
        mean, half = lost(rows, task)
        ax.errorbar(mean, y, xerr=half, color=colour, marker=marker, markersize=4, elinewidth=0.8)
    ax.axvline(0, color="black", linewidth=0.6)
    names = [f"{_told(task)}\n(gain {gain(rows, task):.0f})" for task in order]
    ax.set_yticks(range(len(order)), names)
    ax.set_ylim(-0.5, len(order) - 0.5)
    ax.set_xlabel("mean over degrees (points)")


def _told(task: str) -> str:
    return task.replace("_", " ")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) accuracy below exact's, (b) gradient error at the end, (c) tasks ranked by
    the mean over the degrees that no run fails at, the margin shaded. Bars: 95 %; in (b) all seeds.
    """
    fig, axes = style.figure(2.6, 1, 3)
    _against_features(axes[0, 0], rows, "drop")
    axes[0, 0].axhline(0, color="black", linewidth=0.6)
    style.panel(axes[0, 0], "a", "accuracy lost (points)")
    _against_features(axes[0, 1], rows, "error")
    axes[0, 1].set_yscale("log")
    style.panel(axes[0, 1], "b", "gradient error")
    _ranking(axes[0, 2], rows)
    style.panel(axes[0, 2], "c", "who minds most")
    marks = [
        Line2D([], [], color=LOOKS[t][0], marker=LOOKS[t][1], label=_told(t))
        for t in tasks_of(rows)
    ]
    black: dict[str, Any] = {"color": "black", "linestyle": "none"}
    marks.append(Line2D([], [], marker="o", fillstyle="none", label="skeletons", **black))
    if any(not row["metrics"]["finite"] for row in rows):
        marks.append(Line2D([], [], marker="x", label="not finite", **black))
    fig.legend(
        handles=marks, loc="outside lower center", ncols=6, columnspacing=1.0, handlelength=1.5
    )
    return fig


def table(rows: list[dict[str, Any]]) -> str:
    """Every task, those that mind most first: gain, points lost, then each method's error and
    drops.
    """
    header = ["task", "method", "features", "gradient error, before", "after"]
    header += ["accuracy lost, own method", "accuracy lost, exact attention"]
    lines = []
    for task in ranked(rows):
        mean, half = lost(rows, task)
        told = [
            f"gain {gain(rows, task):.1f} points",
            "",
            "",
            "",
            f"{mean:.1f} ± {half:.1f} (mean)",
            "",
        ]
        lines.append([task, *told])
        for name in (
            methods_of(rows, task, "polynomial")[::-1] + methods_of(rows, task, "skeleton")[::-1]
        ):
            runs = runs_of(rows, task, name).values()
            errors = [
                interval(m["gradient"][w]["method"]["relative"] for m in runs)[0]
                for w in ("before", "after")
            ]
            fallen = [interval(drops(rows, task, name, way)) for way in ("own", "exact")]
            bad = failed(rows, task, name)
            scores = (
                [f"{bad} of {len(runs)} not finite"] * 2
                if bad
                else [f"{m:.1f} ± {h:.1f}" for m, h in fallen]
            )
            k = next(iter(runs))["features"]
            lines.append([task, name, str(k), *(f"{e:.2g}" for e in errors), *scores])
    return markdown(header, lines)
