"""Time and error over L on one device: exact gradients by its kernels, the polynomial ones with
their certificates.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style

CONFIG = "accelerator"
OURS = (style.COLOURS[0], style.COLOURS[1], style.COLOURS[2])
EXACT = (
    style.COLOURS[3],
    style.COLOURS[4],
    style.COLOURS[6],
    style.COLOURS[5],
    style.GREY,
    "#8a8a8a",
    "#5a3d2b",
)
Row = dict[str, Any]


def chosen(rows: list[Row]) -> tuple[str, list[Row]]:
    """(device, its rows by length): an accelerator before a CPU, then the one with most rows."""
    devices = [(row["metrics"]["platform"] != "cpu", row["metrics"]["device"]) for row in rows]
    platform, device = max(devices, key=lambda d: (d[0], devices.count(d)))
    kept = [row for row, d in zip(rows, devices, strict=True) if d == (platform, device)]
    return device, sorted(kept, key=lambda row: row["point"]["length"])


def series(rows: list[Row], name: str, *quantities: str) -> tuple[list[int], list[float]]:
    """(lengths, values) of a method where it was run: the first of the quantities that its entry
    has.
    """
    out = []
    for row in rows:
        method = row["metrics"]["methods"].get(name, {})
        values = [float(method[q]) for q in quantities if method.get(q)]
        if "seconds" in method and values:
            out.append((row["point"]["length"], values[0]))
    lengths, values = zip(*out, strict=True) if out else ((), ())
    return list(lengths), list(values)


def looks(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """How to draw each method that was run anywhere: ours in full, its certified twin dotted, exact
    ones dashed.
    """
    methods = {
        name: m for row in rows for name, m in row["metrics"]["methods"].items() if "seconds" in m
    }
    ours = itertools.cycle(OURS)
    exact = itertools.cycle(EXACT)
    out: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        if method["family"] == "exact":
            out[name] = {
                "color": next(exact),
                "marker": "s",
                "linestyle": "--",
                "linewidth": 0.9,
                "label": name,
            }
            if method["dtype"] != "float32":
                out[name]["label"] = f"{name} ({method['dtype']})"
        else:
            certified = method["family"] == "certified"
            twin = out.get(name.removesuffix(", certified"), {})
            colour = twin["color"] if certified and twin else next(ours)
            out[name] = {
                "color": colour,
                "marker": "o",
                "linestyle": ":" if certified else "-",
                "label": name,
            }
    return out


def _lines(ax: Axes, rows: list[Row], methods: dict[str, dict[str, Any]], *quantities: str) -> None:
    for name, look in methods.items():
        lengths, values = series(rows, name, *quantities)
        if lengths:
            ax.plot(
                lengths,
                values,
                markersize=2.8,
                markerfacecolor="white" if look["linestyle"] == ":" else None,
                **look,
            )
    ax.set_yscale("log")
    style.powers_of_two(ax, [row["point"]["length"] for row in rows])
    ax.set_xlabel("tokens $L$")


def _floors(ax: Axes, rows: list[Row], methods: dict[str, dict[str, Any]]) -> list[str]:
    """A level line for the rounding error of every method of less than float32; their names."""
    names = []
    for name in methods:
        method = next(
            m
            for row in rows
            for n, m in row["metrics"]["methods"].items()
            if n == name and "seconds" in m
        )
        short = (
            method["dtype"]
            if method["dtype"] != "float32"
            else {"tensorfloat32": "TF32"}.get(method["precision"])
        )
        values = series(rows, name, "max_error")[1]
        if short and values:
            level = float(np.median(values))
            ax.axhline(level, color=methods[name]["color"], linewidth=0.9, linestyle="--")
            ax.text(
                1.01, level, short, transform=ax.get_yaxis_transform(), fontsize=6.5, va="center"
            )
            names.append(name)
    return names


def draw(rows: list[Row]) -> Figure:
    """(a) seconds; (b) largest relative error, and, dotted, what is certified of it."""
    device, rows = chosen(rows)
    methods = looks(rows)
    fig, axes = style.figure(3.1, 1, 2)
    ax = axes[0, 0]
    _lines(ax, rows, methods, "seconds")
    style.panel(ax, "a", "time (s)")
    ax = axes[0, 1]
    floors = _floors(ax, rows, methods)
    # Certified twins have the same errors, and a bound; methods of less than float32 are the level
    # lines.
    plain = {n: x for n, x in methods.items() if n not in floors and x["linestyle"] != ":"}
    _lines(ax, rows, {n: x for n, x in methods.items() if x["linestyle"] == ":"}, "bound")
    _lines(ax, rows, plain, "max_error", "estimated_error")
    for name, look in plain.items():
        ax.plot(
            *series(rows, name, "estimated_error"),
            "o",
            color=look["color"],
            markersize=3.5,
            markerfacecolor="white",
        )
    if any(series(rows, name, "estimated_error")[0] for name in plain):
        ax.text(
            0.98,
            0.25,
            "hollow: upper end of an estimate",
            transform=ax.transAxes,
            fontsize=6.5,
            ha="right",
        )
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 1.6)
    style.panel(ax, "b", "relative error; dotted: bound")
    fig.suptitle(device, fontsize=9)
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        handlelength=2.4,
    )
    return fig
