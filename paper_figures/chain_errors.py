"""The chain term by term: errors of Lemmas 3.3 to 3.7 and of the gradients, beside their bounds and
against width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "chain_errors"
TERMS = {"f": "$f$", "c": "$c$", "p1": "$p_1$", "p2": "$p_2$", "p": "$p$"}
ARRAYS = {"query.a": "$A_Q$", "key.b": "$B_K$", "value.a": "$A_V$"}
FACTORS = {"taylor": ("Taylor", "o"), "chebyshev": ("Chebyshev", "s"), "svd": ("SVD of $f$", "^")}
MARKERS = "osD^v"
ERROR, BOUND, SIZE = range(3)  # of a term, in a row
TINY = 1e-300


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) errors of the terms and (b) of the gradients against the degree, bounds dashed; (c)
    errors against k1. Geometric means of the seeds, bands from the least to the largest.
    """
    points = [row["point"] | row["metrics"] for row in rows]
    gammas = sorted({row["gamma"] for row in points})
    gamma = min(gammas, key=lambda value: abs(value - 1))
    fig, axes = style.figure(2.6, 1, 3, sharey=True)
    ax = axes[0]
    taylor = [row for row in points if row["gamma"] == gamma and row["factor"] == "taylor"]
    for axis, names, letter, what in (
        (ax[0], TERMS, "a", "each lemma"),
        (ax[1], ARRAYS, "b", "gradients"),
    ):
        _against_degree(axis, taylor, names)
        style.panel(axis, letter, f"{what}, $\\Gamma = {gamma:g}$")
    ax[0].set_ylabel("max error / largest entry")
    ends = {min(gammas, key=lambda value: abs(value - end)) for end in (0.5, 2)}
    _against_width(ax[2], points, sorted(ends))
    style.panel(ax[2], "c", "$A_Q$, by factor of $f$")
    ax[0].set_yscale("log")
    # Bounds above 100 say nothing, and the SVD ends at rounding.
    ax[0].set_ylim(3e-11, 1e3)
    return fig


def _against_degree(axis: Axes, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    degrees = sorted({row["size"] for row in rows})
    if not rows:
        return style.empty(axis)
    for index, (name, label) in enumerate(names.items()):
        colour = style.COLOURS[index]
        errors, bounds = (
            [_relative([row for row in rows if row["size"] == g], name, part) for g in degrees]
            for part in (ERROR, BOUND)
        )
        _band(axis, degrees, errors, colour)
        errors, bounds = ([_middle(seeds) for seeds in each] for each in (errors, bounds))
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


def _relative(rows: list[dict[str, Any]], name: str, part: int) -> list[float]:
    """An error or bound of each seed over the largest entry of the exact term."""
    return [row["terms"][name][part] / row["terms"][name][SIZE] for row in rows]


def _middle(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(values, TINY)))))


def _band(axis: Axes, x: list[int], seeds: list[list[float]], colour: str) -> None:
    """From the least to the largest seed."""
    ends = [min(each) for each in seeds], [max(each) for each in seeds]
    axis.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0)


def _against_width(axis: Axes, points: list[dict[str, Any]], gammas: list[float]) -> None:
    for index, (factor, (_, marker)) in enumerate(FACTORS.items()):
        for gamma in gammas:
            curve = [r for r in points if r["factor"] == factor and r["gamma"] == gamma]
            ks = sorted({row["k1"] for row in curve})
            seeds = [_relative([r for r in curve if r["k1"] == k], "query.a", ERROR) for k in ks]
            _band(axis, ks, seeds, style.COLOURS[index])
            ys = [_middle(each) for each in seeds]
            face = style.COLOURS[index] if gamma == gammas[-1] else "white"
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
