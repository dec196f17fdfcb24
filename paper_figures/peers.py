"""The polynomial gradient against exact and approximate peers: error, time over L, and MultiLayer's
grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.drawing.statistics import crossover
from paper_figures.numbers.peers import (
    NAMES,
    PUBLISHED,
    RIVALS,
    Rows,
    names_of,
    panel,
    seconds_of,
    table,
)

__all__ = ["draw", "table"]

CONFIG = "peers"
LOOKS = {
    "exact": (style.COLOURS[6], "s"),
    "polynomial": (style.COLOURS[0], "o"),
    "certified": (style.COLOURS[5], "o"),
    "chain": (style.COLOURS[2], "D"),
    "favor": (style.COLOURS[1], "^"),
    "nystrom": (style.COLOURS[3], "v"),
}
RIVAL_LOOKS = {
    "hyper": (style.COLOURS[1], "^"),
    "thinformer": (style.COLOURS[3], "v"),
    "knn": (style.COLOURS[4], "<"),
    "polynomial": (style.COLOURS[0], "o"),
    "tree": (style.COLOURS[2], "D"),
    "sparse": (style.COLOURS[6], "s"),
}


def analytic_crossover(row: dict[str, Any], name: str) -> float:
    """Where the cost model of `choose` puts it: exact grows as L^2 and the polynomial as L, so one
    length tells.
    """
    model = row["metrics"]["model"]
    return row["point"]["length"] * model[name] / model["exact"]


def _series(rows: Rows, pick) -> tuple[list[int], list[float]]:
    """(lengths, seconds) of the rows for which `pick(metrics)` gives any."""
    found = [(r["point"]["length"], pick(r["metrics"])) for r in rows]
    kept = [(n, t) for n, t in found if t]
    return [n for n, _ in kept], [t for _, t in kept]


def _errors(ax: Axes, rows: Rows) -> None:
    """Speed-up against error at the longest sequence with an exact gradient; large markers: equal
    k, the worst seed, and a line over all.
    """
    known = [r for r in panel(rows, "length") if r["metrics"]["best"]]
    if not known:
        return
    row = known[-1]
    metrics = row["metrics"]
    exact = seconds_of(row["metrics"], row["metrics"]["best"]["gradient"]) or 1.0
    for family, runs in metrics["tried"].items():
        points = [(run["error"], exact / run["seconds"]) for run in runs]
        look: dict[str, Any] = {"marker": ".", "markersize": 3, "linewidth": 0.7}
        ax.plot(*zip(*points, strict=True), "-", color=LOOKS[family][0], **look)
    for family in ("favor", "nystrom", "chain", "polynomial"):
        if names := names_of(metrics, family):
            _family(ax, metrics, family, names)
    ax.axhline(1, color=style.GREY, linewidth=0.6, zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.invert_xaxis()
    ax.set_xlabel("relative error; certified: bound")
    power = np.log2(row["point"]["length"])
    style.panel(ax, "a", f"speed-up, $L = 2^{{{power:.0f}}}$")


def _family(ax: Axes, metrics: dict[str, Any], family: str, names: list[str]) -> None:
    """The methods of a family at equal k; of polynomials also k, and the speed with certificate at
    what it certifies, the bound over the largest entry.
    """
    colour, marker = LOOKS[family]
    errors = [metrics["methods"][n]["error"] for n in names]
    speeds = [metrics["speed_up"]["gradient"][n] for n in names]
    # Those of several degrees are joined; FAVOR+ and Nystrom are single choices of k.
    line = "-" if family in ("chain", "polynomial") else "None"
    ax.plot(errors, speeds, linestyle=line, color=colour, marker=marker, markersize=4.5)
    _by_seed(ax, metrics, names, speeds, "error", colour)
    if family != "polynomial":
        return
    above: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
    for n, place in zip(names, zip(errors, speeds, strict=True), strict=True):
        label = f"$k = {metrics['methods'][n]['features']}$"
        ax.annotate(label, place, fontsize=7, **above)
    speeds = [metrics["speed_up"]["certified"][n] for n in names]
    bounds = [metrics["methods"][n]["bound"] for n in names]
    ax.plot(bounds, speeds, "-", color=LOOKS["certified"][0], marker=marker, markersize=4.5)
    _by_seed(ax, metrics, names, speeds, "bound", LOOKS["certified"][0])


def _by_seed(
    ax: Axes, metrics: dict[str, Any], names: list[str], speeds, what: str, colour
) -> None:
    """A level line from the least to the largest error (or bound) of the seeds."""
    for n, speed in zip(names, speeds, strict=True):
        each = metrics["methods"][n]["by_seed"][what]
        ax.hlines(speed, min(each), max(each), color=colour, linewidth=1.6)


def _times(ax: Axes, rows: Rows) -> None:
    """Seconds of one gradient at equal k, of the highest degree, and what the longest is certified
    to, over its largest entry; where exact and certified cross, and were to cross.
    """
    rows = panel(rows, "length")
    if not rows:
        return
    methods = rows[0]["metrics"]["methods"]
    ours = max(
        (n for n, m in methods.items() if m["family"] == "polynomial"),
        key=lambda n: methods[n]["features"],
    )
    k = methods[ours]["features"]
    degree = ours.split()[1]
    picks = {
        "exact": lambda m: seconds_of(m, m["best"].get("gradient", "")),
        "chain": lambda m: seconds_of(m, f"chain {degree}"),
        "favor": lambda m: seconds_of(m, f"favor {k}"),
        "nystrom": lambda m: seconds_of(m, f"nystrom {k}"),
        "certified": lambda m: seconds_of(m, ours, "certified"),
        "polynomial": lambda m: seconds_of(m, ours),
    }
    lines = {family: _series(rows, pick) for family, pick in picks.items()}
    for family, (lengths, seconds) in lines.items():
        colour, marker = LOOKS[family]
        ax.plot(lengths, np.array(seconds) * 1e3, color=colour, marker=marker, markersize=2.5)
    ax.set_yscale("log")
    style.powers_of_two(ax, [r["point"]["length"] for r in rows])
    ax.set_xlabel("tokens $L$")
    bound = rows[-1]["metrics"]["methods"][ours].get("bound")
    told = "" if bound is None else f", bound {bound:.1g}"
    style.panel(ax, "b", f"ms, $k = {k}${told}")
    _crossovers(ax, lines, analytic_crossover(rows[0], ours))


def _crossovers(ax: Axes, lines: dict[str, tuple[list[int], list[float]]], model: float) -> None:
    """Level lines at the lengths from which the certified gradient is the faster one."""
    # They can cross only where both were run.
    both = [n for n in lines["exact"][0] if n in lines["certified"][0]]
    pair = [[dict(zip(*lines[f], strict=True))[n] for n in both] for f in ("exact", "certified")]
    handles = []
    for label, length, dash in (("model", model, ":"), ("measured", crossover(both, *pair), "--")):
        if length is not None:
            look: dict[str, Any] = {"color": style.COLOURS[5], "linestyle": dash, "linewidth": 0.9}
            ax.axvline(length, zorder=0, **look)
            handles.append(Line2D([], [], label=f"{label}: {length:.0f}", **look))
    place: dict[str, Any] = {"loc": "lower right", "title": "crossover", "title_fontsize": 7}
    ax.legend(handles=handles, handlelength=1.4, labelspacing=0.2, borderaxespad=0.1, **place)


def _grid(ax: Axes, rows: Rows) -> None:
    """Speed-ups on MultiLayer's problems: our gradient by degree, our forward at degree 2, its
    forward as published.
    """
    rows = panel(rows, "grid")
    names = list(
        dict.fromkeys(n for r in rows for n in r["metrics"]["speed_up"].get("gradient", {}))
    )
    shades = ("#0072B2", "#56A4D6", "#A9D0EA")

    def line(part: str, name: str, **look) -> None:
        speed_ups = {r["point"]["width"]: r["metrics"]["speed_up"].get(part, {}) for r in rows}
        kept = [(d, of[name]) for d, of in speed_ups.items() if of.get(name)]
        if kept:
            ax.plot(*zip(*kept, strict=True), marker="o", markersize=2.5, **look)

    for name, colour in zip(names, shades, strict=False):
        line("gradient", name, color=colour, label=f"degree {name.split()[1]}")
    line("loss", "polynomial 2", color=shades[0], linestyle=":", label="2, forward")
    d = list(PUBLISHED)
    # Published on another machine, as a ratio that machine made in one run.
    ratio = [exact / fast for exact, fast in PUBLISHED.values()]
    ax.plot(d, ratio, ":", color="black", marker="x", markersize=3.5, label="published, forward")
    ax.axhline(1, color=style.GREY, linewidth=0.6, zorder=0)
    ax.set_yscale("log")
    ax.set_xticks(range(4, 13, 2))
    ax.set_xlabel("width $d$, $L = 10 \\cdot 2^d$")
    ax.legend(loc="upper left", handlelength=1.4, labelspacing=0.2, borderaxespad=0.1)
    style.headroom(ax, 0.35)
    style.panel(ax, "c", "speed-up, MultiLayer")


def _rivals(ax: Axes, rows: Rows, problem: str) -> None:
    """Speed-up against error of each method at its sizes, at the longest sequence of the problem:
    the worst seed, and a line over all.
    """
    mine = [r for r in panel(rows, "rivals") if r["point"]["problem"] == problem]
    if not mine:
        style.empty(ax)
        return
    metrics = mine[-1]["metrics"]
    for family, (colour, marker) in RIVAL_LOOKS.items():
        names = [n for n in names_of(metrics, family) if n in metrics["speed_up"]["gradient"]]
        errors = [metrics["methods"][n]["error"] for n in names]
        speeds = [metrics["speed_up"]["gradient"][n] for n in names]
        ax.plot(errors, speeds, "-", color=colour, marker=marker)
        _by_seed(ax, metrics, names, speeds, "error", colour)
    ax.axhline(1, color=style.GREY, linewidth=0.6, zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.invert_xaxis()
    ax.set_xlabel("relative gradient error")
    power = np.log2(mine[-1]["point"]["length"])
    named = "real head" if problem == "head" else "uniform"
    letter = "e" if problem == "head" else "d"
    style.panel(ax, letter, f"speed-up, {named}, $2^{{{power:.0f}}}$")


def draw(rows: Rows) -> Figure:
    """(a) speed-up over the best exact gradient against error, with certificate against the bound;
    (b) time over L; (c) MultiLayer's grid; (d, e) subquadratic attention of others beside ours, on
    a uniform problem and on a real head.
    """
    fig, axes = style.figure(5.2, 2, 3)
    _errors(axes[0, 0], rows)
    _times(axes[0, 1], rows)
    _grid(axes[0, 2], rows)
    _rivals(axes[1, 0], rows, "tame")
    _rivals(axes[1, 1], rows, "head")
    axes[1, 2].axis("off")
    others = [
        Line2D([], [], color=colour, marker=marker, markersize=3.5, label=RIVALS[family])
        for family, (colour, marker) in RIVAL_LOOKS.items()
    ]
    axes[1, 2].legend(handles=others, loc="center left", title="(d, e)", title_fontsize=7)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=3.5, label=NAMES[family])
        for family, (colour, marker) in LOOKS.items()
    ]
    fig.legend(
        handles=handles, loc="outside upper center", ncols=6, handlelength=1.4, columnspacing=1.2
    )
    return fig
