"""Time, operations and temporary memory over L, exact against polynomial, with fitted exponents."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style
from paper_figures.drawing.statistics import exponent

CONFIG = "scaling"
LABELS = {"exact": "best exact", "polynomial": "polynomial", "certified": "with certificate"}


def series(
    rows: list[dict[str, Any]], case: str, method: str, quantity: str
) -> tuple[list[int], list[float]]:
    """(lengths, values) of one line; "exact" is the method that was fastest at each length."""
    out = []
    for row in rows:
        if row["point"]["case"] != case:
            continue
        metrics = row["metrics"]
        # Which block is the fastest changes with the length.
        name = metrics.get("best") if method == "exact" else method
        value = metrics["methods"].get(name, {}).get(quantity)
        if value:
            out.append((row["point"]["length"], float(value)))
    lengths, values = zip(*sorted(out), strict=True) if out else ((), ())
    return list(lengths), list(values)


def _lines(ax: Axes, rows, quantity: str, unit: float, methods) -> None:
    every: list[int] = []
    for i, method in enumerate(methods):
        for case, dash in (("partial", "-"), ("full", ":")):
            lengths, values = series(rows, case, method, quantity)
            if not lengths:
                continue
            every += lengths
            # One label a method: its second line is told apart by its dash.
            label = None
            if case == "partial":
                fit = exponent(lengths, values)
                label = LABELS[method] + (
                    f", $L^{{{fit[0]:.2f} \\pm {fit[1]:.2f}}}$" if fit else ""
                )
                if method == "certified" and quantity == "seconds":
                    label += _promised(rows)
            ax.plot(
                lengths,
                np.array(values) * unit,
                dash,
                marker="o",
                markersize=2.5,
                color=style.COLOURS[i],
                label=label,
            )
    ax.set_yscale("log")
    if every:
        style.powers_of_two(ax, every)
    ax.set_xlabel("tokens $L$")
    style.legend(ax, loc="upper left", handlelength=1.2, labelspacing=0.2, borderaxespad=0.2)
    style.headroom(ax, 0.35)


def _promised(rows: list[dict[str, Any]]) -> str:
    """The bound at that speed, over the largest entry: its range over the rows that hold one."""
    bounds = [row["metrics"]["bound"] for row in rows if "bound" in row["metrics"]]
    return f",\n  bound {min(bounds):.1g} to {max(bounds):.1g}" if bounds else ""


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) seconds, (b) counted operations, (c) temporary memory; solid: partial (Q, V), dotted:
    full (Q, K, V).
    """
    fig, axes = style.figure(2.5, 1, 3)
    _lines(axes[0, 0], rows, "seconds", 1e3, ("exact", "polynomial", "certified"))
    style.panel(axes[0, 0], "a", "time (ms)")
    _lines(axes[0, 1], rows, "operations", 1e-9, ("exact", "polynomial"))
    style.panel(axes[0, 1], "b", "operations ($10^9$)")
    _lines(axes[0, 2], rows, "temporary", 1e-6, ("exact", "polynomial", "certified"))
    style.panel(axes[0, 2], "c", "temporary memory (MB)")
    return fig
