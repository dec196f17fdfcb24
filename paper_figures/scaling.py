"""Time, operations, temporary memory and bytes between devices over L, exact against polynomial,
with fitted exponents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style
from paper_figures.drawing.statistics import exponent

CONFIG = "scaling"
LABELS = {"exact": "best exact", "polynomial": "polynomial", "certified": "with certificate"}
# What devices tell each other: the line's colour is that of the method, as in the other panels.
EXCHANGED = {
    "exact attention": ("attention, exact", 0, "s"),
    "attention": ("attention, polynomial", 1, "s"),
    "gradient": ("gradient with its bounds", 2, "o"),
}


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


def exchanged(rows: list[dict[str, Any]], case: str, what: str) -> tuple[list[int], list[int]]:
    """(lengths, bytes that every device tells the others), of the rows that count them."""
    found = [r for r in rows if r["point"]["case"] == case and "exchanged" in r["metrics"]]
    pairs = sorted((r["point"]["length"], r["metrics"]["exchanged"][what]) for r in found)
    return [length for length, _ in pairs], [size for _, size in pairs]


def _devices(ax: Axes, rows) -> None:
    every: list[int] = []
    for what, (label, colour, marker) in EXCHANGED.items():
        # Attention has no adapters: one line.
        for case, dash in (("partial", "-"), ("full", ":"))[: 2 if what == "gradient" else 1]:
            lengths, sizes = exchanged(rows, case, what)
            every += lengths
            ax.plot(
                lengths,
                np.array(sizes) * 1e-3,
                dash,
                marker=marker,
                markersize=2.5,
                color=style.COLOURS[colour],
                label=label if case == "partial" else None,
            )
    ax.set_yscale("log")
    style.powers_of_two(ax, every)
    ax.set_xlabel("tokens $L$")
    style.legend(ax, loc="upper left", handlelength=1.2, labelspacing=0.2, borderaxespad=0.2)
    style.headroom(ax, 0.35)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) seconds, (b) counted operations, (c) temporary memory, and of rows that have it (d) what
    each of eight devices tells the others; solid: partial (Q, V), dotted: full (Q, K, V).
    """
    told = any("exchanged" in row["metrics"] for row in rows)
    fig, axes = style.figure(4.6, 2, 2) if told else style.figure(2.5, 1, 3)
    a, b, c = axes.reshape(-1)[:3]
    _lines(a, rows, "seconds", 1e3, ("exact", "polynomial", "certified"))
    style.panel(a, "a", "time (ms)")
    _lines(b, rows, "operations", 1e-9, ("exact", "polynomial"))
    style.panel(b, "b", "operations ($10^9$)")
    _lines(c, rows, "temporary", 1e-6, ("exact", "polynomial", "certified"))
    style.panel(c, "c", "temporary memory (MB)")
    if told:
        _devices(axes[1, 1], rows)
        style.panel(axes[1, 1], "d", "each of 8 devices sends (kB)")
    return fig
