"""How cost grows: operations against L, widths against Gamma to L = 2^64, and the price of the LoRA
rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "rates"
ALGORITHMS = {
    "literal": ("Lemma 3.1 as written", "v"),
    "dense": ("dense", "s"),
    "chain": ("chain", "^"),
    "fast": ("fast", "o"),
}
MARKERS = "os^Dv"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) counted operations with fitted exponents, (b, c) log k / log L against L and against
    Gamma, (d) the rank.
    """
    points = [row["point"] | row["metrics"] for row in rows]
    panels = {
        name: [p for p in points if p["panel"] == name]
        for name in ("operations", "counted", "measured", "rank")
    }
    fig, axes = style.figure(4.4, 2, 2)
    _operations(axes[0, 0], panels["operations"])
    _against_length(axes[0, 1], panels["counted"], panels["measured"])
    _against_gamma(axes[1, 0], panels["counted"], panels["measured"])
    _rank(axes[1, 1], panels["rank"])
    return fig


def _operations(axis: Axes, rows: list[dict[str, Any]]) -> None:
    style.panel(axis, "a", "operations, counted")
    if not rows:
        return style.empty(axis)
    for index, (name, (label, marker)) in enumerate(ALGORITHMS.items()):
        curve = sorted(
            (row for row in rows if row["algorithm"] == name), key=lambda row: row["power"]
        )
        x = np.array([2.0 ** row["power"] for row in curve])
        y = np.array([float(row["flops"]) for row in curve])
        slope = (
            np.polyfit(np.log(x[len(x) // 2 :]), np.log(y[len(y) // 2 :]), 1)[0]
            if len(x) > 2
            else math.nan
        )
        text = f"{label}: $L^{{{slope:.2f}}}$" if len(x) > 2 else label
        axis.plot(x, y, color=style.COLOURS[index], marker=marker, label=text)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("$L$")
    axis.legend(loc="upper left", handlelength=1.4, labelspacing=0.2, borderaxespad=0.1)


def _shown(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[float]:
    """The kappas of panel (b): those that were measured, and a small and a large one beside
    them.
    """
    every = sorted({row["kappa"] for row in rows})
    run = {row["kappa"] for row in measured}
    return sorted(
        run & set(every) | {min(every, key=lambda kappa: abs(kappa - best)) for best in (0.01, 1)}
    )


def _against_length(axis: Axes, rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    style.panel(axis, "b", "width as a power of $L$")
    if not rows:
        return style.empty(axis)
    shown = _shown(rows, measured)
    for index, kappa in enumerate(shown):
        curve = sorted((row for row in rows if row["kappa"] == kappa), key=lambda row: row["power"])
        runs = [r for r in measured if r["kappa"] == kappa]
        _one_kappa(axis, curve, runs, style.COLOURS[index])
    axis.axhline(1, color=style.GREY, linewidth=0.8, zorder=0)
    powers = sorted({row["power"] for row in rows} & {8, 16, 32, 64})
    axis.set_xscale("log", base=2)
    axis.set_xticks(powers, [f"$2^{{{power}}}$" for power in powers])
    axis.set_xlim(5.5, 150)
    axis.set_ylim(-0.1, 3.4)
    axis.set_xlabel("$L$   ($d = \\log_2 L$, $\\beta = 1/d$, $\\kappa = \\Gamma/\\sqrt{\\ln L}$)")
    axis.set_ylabel("$\\log k / \\log L$")
    looks: dict[str, dict[str, Any]] = {
        "counted, tolerance $1/L$": {},
        "limit, $L \\to \\infty$": {"linestyle": ":"},
        "measured, query and value": {"marker": "o", "linestyle": ""},
        "measured, key as well": {"marker": "^", "linestyle": "", "markerfacecolor": "white"},
    }
    handles = [Line2D([], [], color="black", label=name, **look) for name, look in looks.items()]
    tight: dict[str, Any] = {"handlelength": 1.3, "columnspacing": 0.8, "labelspacing": 0.2}
    axis.legend(handles=handles, loc="upper left", ncols=2, **tight)


def _one_kappa(
    axis: Axes, curve: list[dict[str, Any]], runs: list[dict[str, Any]], colour: str
) -> None:
    """The counted exponents and their limit, and those measured for uniform inputs."""
    axis.plot([r["power"] for r in curve], [r["exponent"] for r in curve], color=colour)
    end, limit = curve[-1]["power"], curve[-1]["limit"]
    axis.plot([end, 1.25 * end], [limit] * 2, color=colour, linestyle=":", linewidth=0.9)
    label = f"$\\kappa = {curve[-1]['kappa']:g}$"
    axis.annotate(label, (1.3 * end, limit), va="center", fontsize=7, color=colour)
    for name, look in {
        "partial": {"marker": "o", "markersize": 2.8},
        "full": {"marker": "^", "markersize": 3, "markerfacecolor": "white"},
    }.items():
        # of every length the mean over seeds, none where a seed needs more than was measured
        found: dict[int, list[float]] = {}
        for r in runs:
            if name in r:
                exponent = r[name]["exponent"]
                found.setdefault(r["power"], []).append(math.nan if exponent is None else exponent)
        means = [float(np.mean(values)) for values in found.values()]
        style_of: dict[str, Any] = {"color": colour, "linestyle": "", **look}
        axis.plot(list(found), means, **style_of)


def _against_gamma(axis: Axes, rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    style.panel(axis, "c", "a slope, not a cliff")
    if not rows:
        return style.empty(axis)
    powers = sorted({row["power"] for row in rows})
    for index, power in enumerate(sorted({powers[0], powers[len(powers) // 2], powers[-1]})):
        curve = sorted((row for row in rows if row["power"] == power), key=lambda row: row["kappa"])
        ratio = [row["kappa"] ** 2 for row in curve]
        colour = style.COLOURS[index]
        label = f"$L = 2^{{{power}}}$"
        times = [1 + row["exponent"] for row in curve]
        axis.plot(ratio, times, color=colour, marker=MARKERS[index], markersize=2.5, label=label)
    limits = sorted({(row["kappa"] ** 2, 1 + row["limit"]) for row in rows})
    axis.plot(*zip(*limits, strict=True), color="black", linewidth=0.9, label="$L \\to \\infty$")
    # Past e^-e the term falls again.
    known = np.geomspace(min(limits[0][0], math.exp(-math.e)), math.exp(-math.e), 60)
    # The known time exponent, which the counted ones are held against.
    curve = 1 + np.log(np.log(1 / known)) / np.log(1 / known)
    label = r"known: $1 + \log\log\frac{1}{\rho}\,/\log\frac{1}{\rho}$"
    axis.plot(known, curve, color="black", linestyle="--", linewidth=0.9, label=label)
    axis.axhline(2, color=style.GREY, linewidth=0.8, zorder=0)
    axis.annotate(
        "exact",
        (0.99, 2.04),
        xycoords=("axes fraction", "data"),
        ha="right",
        fontsize=7,
        color="#777777",
    )
    axis.set_xscale("log")
    axis.set_ylim(0.9, 4.2)
    axis.set_xlabel(r"$\rho = R / \ln L = \kappa^2$")
    axis.set_ylabel("time exponent, $1 + \\log k / \\log L$")
    axis.legend(loc="upper left", handlelength=1.4, labelspacing=0.2, borderaxespad=0.1)


def _rank(axis: Axes, rows: list[dict[str, Any]]) -> None:
    style.panel(axis, "d", "LoRA rank")
    if not rows:
        return style.empty(axis)
    rows = sorted(rows, key=lambda row: row["rank"])
    ranks = [row["rank"] for row in rows]
    for index, (name, label, marker) in enumerate((("dense", "dense", "s"), ("fast", "fast", "o"))):
        ys = [row[name] / rows[0]["dense"] for row in rows]
        axis.plot(
            ranks,
            ys,
            color=style.COLOURS[(1, 3)[index]],
            marker=marker,
            label=f"operations, {label}",
        )
    axis.plot(
        ranks,
        [row["error"] for row in rows],
        color="black",
        marker="D",
        linestyle="--",
        label="error of the gradient",
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(1e-4, 30)
    axis.set_xticks(ranks, [f"{rank}" for rank in ranks])
    axis.set_xlabel("$r$   ($\\Gamma = 1$ throughout)")
    axis.set_ylabel("relative to dense, $r = 1$")
    axis.legend(
        loc="upper left",
        ncols=2,
        handlelength=1.6,
        columnspacing=0.8,
        labelspacing=0.2,
        borderaxespad=0.1,
    )
