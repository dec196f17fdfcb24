"""What a guarantee costs: certified bound over true error, by degree, score range and family; the
price in degrees.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "certificates"
SERIES = {"taylor": ("Taylor", "o"), "chebyshev": ("Chebyshev", "s"), "fitted": ("fitted", "^")}
RIGHT = 0.1  # largest error, over the largest entry of the gradient, at which a gradient is of use
TOLERANCES = {"10 %": 1e-1, "1 %": 1e-2, "0.1 %": 1e-3}
# What is paid, and the colours of the bar and of the word in it; "none": no degree that was run is
# certified.
PRICES = {
    "0": ("#EAF2F8", "black"),
    "1": ("#B5D3E7", "black"),
    "2": ("#67A9CF", "black"),
    "3": ("#0072B2", "white"),
    "4 +": ("#00395A", "white"),
    "none": ("white", "black"),
}
Table = dict[str, np.ndarray]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a-c) bound / error against the degree; (d) against R; (e) by family; (f) degrees paid for
    the guarantee.
    """
    table = _table(rows)
    useful = table["clear"] & table["right"]
    fig, axes = style.figure(3.9, 2, 3, width_ratios=(1.06, 1, 1))
    for axis in axes[0, 1:]:
        axis.sharey(axes[0, 0])
    for axis, letter, name in zip(axes[0], "abc", ("query", "key", "value"), strict=True):
        style.panel(axis, letter, f"{name} adapter")
        _against_degree(axis, table, useful & (table["adapter"] == name))
        axis.tick_params(labelleft=name == "query")
    axes[0, 0].set_ylim(1, None)
    axes[0, 0].set_ylabel("bound / error")
    tight: dict[str, Any] = {"handlelength": 1.4, "labelspacing": 0.2, "borderaxespad": 0.1}
    style.legend(axes[0, 1], loc="upper right", **tight)
    _against_reach(axes[1, 0], table, rows)
    _by_family(axes[1, 1], table, useful)
    _price(axes[1, 2], rows)
    return fig


def _table(rows: list[dict[str, Any]]) -> Table:
    """A line for each array of each instance at each degree. right: the instance's whole gradient
    is, to RIGHT.
    """
    lines = []
    for row in rows:
        point = row["point"]
        metrics = row["metrics"]
        worst = np.max([metrics["errors"][name] for name in metrics["errors"]], axis=0)
        for name, errors in metrics["errors"].items():
            bounds = metrics["bounds"][name]
            guards = metrics["guards"][name]
            for i, reach in enumerate(metrics["reach"]):
                for j, degree in enumerate(point["degrees"]):
                    error = errors[i][j]
                    bound = bounds[i][j]
                    # An error at the reference's rounding, or an infinite bound, gives no ratio.
                    clear = error > guards[i] and np.isfinite(bound)
                    right = worst[i, j] <= RIGHT
                    ratio = bound / error if error else np.inf
                    lines.append(
                        (
                            point["series"],
                            point["kind"],
                            name.split(".")[0],
                            degree,
                            reach,
                            ratio,
                            clear,
                            right,
                        )
                    )
    columns = zip(*lines, strict=True)
    names = ("series", "kind", "adapter", "degree", "reach", "ratio", "clear", "right")
    return {name: np.array(column) for name, column in zip(names, columns, strict=True)}


def _band(values: np.ndarray) -> tuple[float, float, float]:
    """10 %, median and 90 %."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return float(low), float(middle), float(high)


def _against_degree(axis: Axes, table: Table, chosen: np.ndarray) -> None:
    for index, (series, (label, marker)) in enumerate(SERIES.items()):
        mine = chosen & (table["series"] == series)
        degrees = np.unique(table["degree"][mine])
        if not len(degrees):
            continue
        low, middle, high = np.transpose(
            [_band(table["ratio"][mine & (table["degree"] == g)]) for g in degrees]
        )
        colour = style.COLOURS[index]
        x = degrees + 0.22 * (index - 1)
        axis.vlines(x, low, high, color=colour, linewidth=0.8, alpha=0.7)
        axis.plot(
            x,
            middle,
            color=colour,
            marker=marker,
            markerfacecolor="white",
            linewidth=0.9,
            label=label,
        )
    axis.set_yscale("log")
    axis.set_xticks(np.unique(table["degree"]))
    axis.set_xlabel("degree $g$")


def _against_reach(axis: Axes, table: Table, rows: list[dict[str, Any]]) -> None:
    style.panel(axis, "d", "Taylor, every array")
    mine = table["clear"] & (table["series"] == "taylor")
    if not mine.any():
        return style.empty(axis)
    reach, ratio, right = (table[name][mine] for name in ("reach", "ratio", "right"))
    look: dict[str, Any] = {"linestyle": "", "marker": ".", "markersize": 2, "markeredgewidth": 0}
    look["rasterized"] = True  # thousands of points
    axis.plot(reach[~right], ratio[~right], color=style.GREY, **look)
    axis.plot(reach[right], ratio[right], color=style.COLOURS[5], **look)
    edges = np.geomspace(reach.min(), reach.max() * (1 + 1e-9), 7)
    inside = np.digitize(reach, edges) - 1
    bins = [i for i in range(6) if (inside == i).any()]
    centres = np.sqrt(edges[1:] * edges[:-1])[bins]
    middle = [np.median(ratio[inside == i]) for i in bins]
    axis.plot(centres, middle, color="black", marker="o", linewidth=1.0)
    axis.axhline(1, color="black", linewidth=0.7, linestyle="--")
    violations = sum(row["metrics"]["violations"] for row in rows)
    checked = sum(row["metrics"]["checked"] for row in rows)
    note = f"violated: {violations} of {checked:,}"
    axis.annotate(note, (0.5, 0.03), xycoords="axes fraction", fontsize=7, ha="center")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(0.02, 10 * ratio.max())
    axis.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    axis.set_xlabel("largest centred score $R$")
    axis.set_ylabel("bound / error")
    handles = [
        Line2D([], [], color="black", marker="o", label="median of all"),
    ]
    told = {f"gradient right to {100 * RIGHT:.0f} %": style.COLOURS[5], "others": style.GREY}
    for label, colour in told.items():
        handles.append(Line2D([], [], color=colour, marker="o", linestyle="", label=label))
    tight: dict[str, Any] = {"handlelength": 1.2, "labelspacing": 0.2, "borderaxespad": 0.1}
    axis.legend(handles=handles, loc="upper left", **tight)


def _by_family(axis: Axes, table: Table, useful: np.ndarray) -> None:
    """All arrays, at the degrees that every series was run at."""
    style.panel(axis, "e", "by family of inputs")
    kinds = list(dict.fromkeys(table["kind"]))
    present = set(table["series"])
    shared = set.intersection(
        *(set(table["degree"][table["series"] == series]) for series in present)
    )
    useful = useful & np.isin(table["degree"], list(shared))
    for index, (series, (_, marker)) in enumerate(SERIES.items()):
        for place, kind in enumerate(kinds):
            values = table["ratio"][useful & (table["series"] == series) & (table["kind"] == kind)]
            if len(values):
                low, middle, high = _band(values)
                y = place + 0.26 * (index - 1)
                colour = style.COLOURS[index]
                axis.hlines(y, low, high, color=colour, linewidth=0.8, alpha=0.7)
                axis.plot([middle], [y], color=colour, marker=marker, markerfacecolor="white")
    axis.set_xscale("log")
    axis.set_xlim(1, None)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.set_xlabel(f"bound / error, $g = {', '.join(f'{g}' for g in sorted(shared))}$")


def _first(degrees: list[int], values: np.ndarray, tolerance: float) -> int | None:
    return next((g for g, value in zip(degrees, values, strict=True) if value <= tolerance), None)


def _prices(rows: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Smallest degree whose bound is within the tolerance, less the smallest whose error is, as a
    key of PRICES.

    Only of instances with such an error at some degree that was run.
    """
    names = list(PRICES)
    out = []
    for row in rows:
        if row["point"]["series"] == "taylor":
            degrees = row["point"]["degrees"]
            errors, bounds = (
                np.max(list(row["metrics"][what].values()), axis=0) for what in ("errors", "bounds")
            )
            for error, bound in zip(errors, bounds, strict=True):
                needed = _first(degrees, error, tolerance)
                certified = _first(degrees, bound, tolerance)
                if needed is not None:
                    out.append(
                        "none"
                        if certified is None
                        else names[min(certified - needed, len(names) - 2)]
                    )
    return out


def _price(axis: Axes, rows: list[dict[str, Any]]) -> None:
    style.panel(axis, "f", "degrees paid, Taylor")
    ticks = []
    for place, (name, tolerance) in enumerate(TOLERANCES.items()):
        prices = _prices(rows, tolerance)
        base = 0.0
        ticks.append(f"{name}\n({len(prices)})")
        for price, (colour, ink) in PRICES.items():
            share = prices.count(price) / max(len(prices), 1)
            axis.bar(
                place, share, bottom=base, width=0.8, color=colour, edgecolor="black", linewidth=0.4
            )
            if share > 0.055:
                where = (place, base + share / 2)
                axis.annotate(price, where, ha="center", va="center", fontsize=6, color=ink)
            base += share
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlabel("tolerance (instances)")
    axis.set_ylabel("share")
