"""Both promises beside the error they are of, against the length; and what attacks made of the
certified one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "promises"
LOOKS: dict[str, Any] = {"certified": "-", "confident": "--", "error": ":"}
MARKERS = {"float64": "o", "float32": "s"}
Rows = list[dict[str, Any]]


def draw(rows: Rows) -> Figure:
    """(a, b) bounds and error over the largest entry, against L, in each precision, the worst of
    the arrays; lines through medians over seeds, bands over all seeds. (c) error over bound under
    attack.
    """
    fig, axes = style.figure(2.9, 1, 3, width_ratios=(1, 1, 1.05))
    axes[0, 1].sharey(axes[0, 0])
    plain = [row for row in rows if "length" in row["point"]]
    for axis, letter, dtype in zip(axes[0], "ab", MARKERS, strict=False):
        style.panel(axis, letter, dtype)
        _against_length(axis, [row for row in plain if row["point"]["dtype"] == dtype])
    axes[0, 0].set_ylabel("over the largest entry")
    axes[0, 1].tick_params(labelleft=False)
    _looks(axes[0, 0], axes[0, 1], plain)
    style.panel(axes[0, 2], "c", "error / bound, attacked")
    _attacks(axes[0, 2], [row for row in rows if "attack" in row["point"]])
    return fig


def _degrees(rows: Rows) -> list[int]:
    return sorted({degree for row in rows for degree in row["fields"]["degrees"]})


def _against_length(axis: Axes, rows: Rows) -> None:
    if not rows:
        style.empty(axis)
        return
    lengths = sorted({row["point"]["length"] for row in rows})
    for number, degree in enumerate(_degrees(rows)):
        for what, dash in LOOKS.items():
            # {length: the worst array of each seed}
            found = defaultdict(list)
            for row in rows:
                at = row["fields"]["degrees"].index(degree)
                worst = max(values[at] for values in row["metrics"][what].values())
                found[row["point"]["length"]].append(worst)
            middle = [np.median(found[length]) for length in lengths]
            low, high = ([f(found[length]) for length in lengths] for f in (min, max))
            colour = style.COLOURS[number]
            axis.plot(lengths, middle, dash, color=colour, marker=".", markersize=3)
            axis.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    style.powers_of_two(axis, lengths)
    axis.set_xlabel("tokens $L$")


def _looks(first: Axes, second: Axes, rows: Rows) -> None:
    """Degrees by colour in one panel, bounds by line in the other."""
    if not rows:
        return
    tight: dict[str, Any] = {"loc": "upper center", "handlelength": 1.6, "columnspacing": 0.8}
    tight |= {"labelspacing": 0.2, "borderaxespad": 0.1, "ncol": 2}
    colours = [
        Line2D([], [], color=style.COLOURS[number], label=f"degree {degree}")
        for number, degree in enumerate(_degrees(rows))
    ]
    first.legend(handles=colours, **tight)
    lines = [Line2D([], [], color="black", linestyle=d, label=what) for what, d in LOOKS.items()]
    second.legend(handles=lines, **tight)
    style.headroom(first, 0.16)


def _attacks(axis: Axes, rows: Rows) -> None:
    """The largest ratio of every family, and how many problems there were."""
    if not rows:
        style.empty(axis)
        return
    worst: dict[tuple[str, str], float] = defaultdict(float)
    problems: dict[str, int] = defaultdict(int)
    violations = 0
    for row in rows:
        for name, tally in row["metrics"]["families"].items():
            part = _part(row["point"]["attack"], name)
            if part is None:
                continue
            key = (part, row["point"]["dtype"])
            # a bound that is no number has no ratio, and is written as "inf"
            worst[key] = max(worst[key], float(tally["worst"]))
            problems[part] += tally["problems"]
            violations += tally["violations"]
    names = list(problems)
    for (name, dtype), ratio in worst.items():
        colour = style.COLOURS[list(MARKERS).index(dtype)]
        look: dict[str, Any] = {"marker": MARKERS[dtype], "markerfacecolor": "white"}
        # A family of which no error was seen has no place on a log axis.
        axis.plot([max(ratio, 1e-4)], [names.index(name)], color=colour, linestyle="", **look)
    axis.axvline(1, color="black", linewidth=0.7, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlim(5e-5, 3)
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(f"{sum(problems.values()):,} problems, {violations} violated", fontsize=8)
    handles = [
        Line2D(
            [], [], color=style.COLOURS[i], marker=m, markerfacecolor="white", linestyle="", label=d
        )
        for i, (d, m) in enumerate(MARKERS.items())
    ]
    axis.legend(handles=handles, loc="center left", handletextpad=0.1, borderaxespad=0.1)


def _part(attack: str, family: str) -> str | None:
    """What a tally is drawn under; None where its problems are counted under another name too."""
    if attack != "families":
        return attack if attack != "directed" else family.replace("_", " ")
    kind, _, name = family.partition(": ")
    # Every problem of this attack has a kind, a twist and a target.
    return name if kind == "kind" else None
