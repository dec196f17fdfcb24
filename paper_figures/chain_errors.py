"""The chain term by term: errors of Lemmas 3.3 to 3.7 and of the gradients, beside their bounds and
against width.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "chain_errors"
TERMS = {"f": "$f$", "c": "$c$", "p1": "$p_1$", "p2": "$p_2$", "p": "$p$"}
ARRAYS = {"query.a": "$A_Q$", "key.b": "$B_K$", "value.a": "$A_V$"}
FACTORS = {"taylor": ("Taylor", "o"), "chebyshev": ("Chebyshev", "s"), "svd": ("SVD of $f$", "^")}
MARKERS = "osD^v"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) errors of the terms and (b) of the gradients against the degree, bounds dashed; (c)
    errors against k1.
    """
    points = [row["point"] | row["metrics"] for row in rows]
    gammas = sorted({row["gamma"] for row in points})
    gamma = min(gammas, key=lambda value: abs(value - 1))
    fig, axes = style.figure(2.6, 1, 3, sharey=True)
    ax = axes[0]
    taylor = [row for row in points if row["gamma"] == gamma and row["factor"] == "taylor"]
    taylor.sort(key=lambda row: row["size"])
    for axis, names, letter, what in (
        (ax[0], TERMS, "a", "each lemma"),
        (ax[1], ARRAYS, "b", "gradients"),
    ):
        _against_degree(axis, taylor, names)
        style.panel(axis, letter, f"{what}, $\\Gamma = {gamma:g}$")
    ax[0].set_ylabel("max error / largest entry")
    _against_width(ax[2], points, sorted({gammas[0], gammas[-1]}))
    style.panel(ax[2], "c", "$A_Q$, by factor of $f$")
    ax[0].set_yscale("log")
    # Bounds above 100 say nothing, and the SVD ends at rounding.
    ax[0].set_ylim(3e-11, 1e3)
    return fig


def _against_degree(axis: Axes, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    degrees = [row["size"] for row in rows]
    if not rows:
        return style.empty(axis)
    for index, (name, label) in enumerate(names.items()):
        error, bound, size = (
            list(column) for column in zip(*(row["terms"][name] for row in rows), strict=True)
        )
        colour = style.COLOURS[index]
        errors, bounds = ([x / s for x, s in zip(xs, size, strict=True)] for xs in (error, bound))
        marker = MARKERS[index]
        axis.plot(
            degrees,
            errors,
            color=colour,
            marker=marker,
            markerfacecolor="white",
            linewidth=1.0,
            label=label,
        )
        axis.plot(degrees, bounds, color=colour, linestyle="--", linewidth=0.8)
    axis.plot([], [], color="black", linestyle="--", linewidth=0.8, label="bound")
    axis.set_xlabel("degree $g$ (Taylor)")
    axis.set_xticks(degrees)
    axis.legend(loc="lower left", handlelength=1.4, labelspacing=0.2, borderaxespad=0.1)


def _against_width(axis: Axes, points: list[dict[str, Any]], gammas: list[float]) -> None:
    for index, (factor, (_, marker)) in enumerate(FACTORS.items()):
        for gamma in gammas:
            curve = sorted(
                (r for r in points if r["factor"] == factor and r["gamma"] == gamma),
                key=lambda r: r["k1"],
            )
            ys = [row["terms"]["query.a"][0] / row["terms"]["query.a"][2] for row in curve]
            face = style.COLOURS[index] if gamma == gammas[-1] else "white"
            ks = [row["k1"] for row in curve]
            axis.plot(ks, ys, color=style.COLOURS[index], marker=marker, markerfacecolor=face)
    axis.set_xscale("log")
    axis.set_xlabel("width $k_1$ of the factor")
    handles = [
        Line2D([], [], color=style.COLOURS[index], marker=marker, label=label)
        for index, (label, marker) in enumerate(FACTORS.values())
    ]
    for gamma in gammas:
        face = "black" if gamma == gammas[-1] else "white"
        label = f"$\\Gamma = {gamma:g}$"
        handles.append(
            Line2D(
                [], [], color="black", marker="o", linestyle="", markerfacecolor=face, label=label
            )
        )
    axis.legend(
        handles=handles, loc="lower left", handlelength=1.4, labelspacing=0.2, borderaxespad=0.1
    )
