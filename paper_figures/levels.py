"""The hierarchy of low ranks: eps-ranks of f, q, p1, p2 and p beside the widths of the paper's chain,
and what blocks under a tree on the tokens store.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "levels"
MATRICES = {"f": "$f$", "q": "$q$", "p1": "$p_1$", "p2": "$p_2$", "p": "$p$"}
FAMILIES = {
    "uniform": style.COLOURS[0],
    "gaussian": style.COLOURS[2],
    "outliers": style.COLOURS[4],
    "gadget": style.COLOURS[1],
}
HEADS = "#777777"
TOLERANCE = "1/L"

Points = list[dict[str, Any]]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a, b) ranks at tolerance 1/L (Frobenius) against R / ln L at the longest L, uniform inputs and
    the hardness gadget; dashed: the widths of the chain's factors. (c) the rank of p over L, of
    every family and of real heads (crosses, at their own R). (d) numbers that the blocks of a level
    of the tree store over L^2, for p at 1 % error and Gamma = 1, the mean of the seeds, and for real
    heads from the lowest to the highest. Bars: all seeds about their median.
    """
    points = [row["point"] | row["metrics"] for row in rows]
    families = [p for p in points if p["kind"] == "family"]
    heads = [p for p in points if p["kind"] == "head"]
    longest = max((p["length"] for p in families), default=0)
    last = [p for p in families if p["length"] == longest]
    fig, axes = style.figure(4.6, 2, 2)
    for j, family in enumerate(("uniform", "gadget")):
        mine = [p for p in last if p["family"] == family]
        _ranks(axes[0, j], mine)
        style.panel(axes[0, j], "ab"[j], f"{family}, $L = {longest}$")
        axes[0, j].set_xlabel(r"$R / \ln L$")
    axes[0, 0].set_ylabel("rank at error $1/L$")
    _lengths(axes[1, 0], families, heads)
    _tree(axes[1, 1], last, heads)
    return fig


def seeds_of(points: Points) -> list[Points]:
    """The points of each norm, small to large, which differ in their seed alone."""
    gammas = sorted({p["gamma"] for p in points})
    return [[p for p in points if p["gamma"] == gamma] for gamma in gammas]


def _line(ax: Axes, x: list[float], seeds: list[list[float]], **look: Any) -> None:
    """Medians of the seeds, and bars from the least to the largest."""
    middle = np.array([np.median(each) for each in seeds])
    ends = np.array([[min(each), max(each)] for each in seeds]).reshape(-1, 2)
    bars = np.maximum([middle - ends[:, 0], ends[:, 1] - middle], 0)
    ax.errorbar(x, middle, bars, elinewidth=0.7, **look)


def _ranks(ax: Axes, points: Points) -> None:
    """Ranks, solid, and widths of the chain, dashed, by matrix."""
    norms = seeds_of(points)
    x = [seeds[0]["gamma"] ** 2 / math.log(seeds[0]["length"]) for seeds in norms]
    for i, (name, label) in enumerate(MATRICES.items()):
        colour = style.COLOURS[i]
        ranks = [[p["ranks"][TOLERANCE][name] for p in seeds] for seeds in norms]
        _line(ax, x, ranks, fmt="o-", color=colour, label=label)
        if name in ("f", "p"):
            widths = [
                float(np.median([p["widths"][TOLERANCE][name] or math.nan for p in seeds]))
                for seeds in norms
            ]
            ax.plot(x, widths, "--", color=colour, linewidth=0.9)
    if points:
        ax.axhline(points[0]["length"], color=style.GREY, linewidth=0.8, zorder=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(0.8, 2e5)
        ax.legend(loc="upper left", ncols=3, handlelength=1, columnspacing=0.6, labelspacing=0.1)


def _lengths(ax: Axes, families: Points, heads: Points) -> None:
    """rank(p) / L against R / ln L."""
    style.panel(ax, "c", "rank of $p$ over $L$")
    for family, colour in FAMILIES.items():
        for n in sorted({p["length"] for p in families}):
            norms = seeds_of([p for p in families if p["family"] == family and p["length"] == n])
            x = [seeds[0]["gamma"] ** 2 / math.log(n) for seeds in norms]
            y = [[p["ranks"][TOLERANCE]["p"] / n for p in seeds] for seeds in norms]
            size = 1.5 + 0.6 * (math.log2(n) - 8)
            _line(ax, x, y, fmt="o-", color=colour, markersize=size, linewidth=0.7)
        if any(p["family"] == family for p in families):
            ax.plot([], [], color=colour, label=family)
    x = [p["score_ratio"] for p in heads]
    ax.plot(x, [p["ranks"][TOLERANCE]["p"] / p["tokens"] for p in heads], "x", color=HEADS)
    ax.plot([], [], "x", color=HEADS, label="real heads")
    ax.set_xscale("log")
    ax.set_ylim(0, 1.05)
    ax.set_xlabel(r"$R / \ln L$   (larger dots: longer)")
    ax.legend(loc="upper left", handlelength=1, labelspacing=0.1)


def _tree(ax: Axes, families: Points, heads: Points) -> None:
    """Numbers stored over L^2 by level."""
    style.panel(ax, "d", "$p$ in a tree, error 1 %: numbers over $L^2$")

    def stored(p: dict[str, Any]) -> list[float]:
        return [level["stored"] for level in p["tree"]["1%"]["p"]]

    for family, colour in FAMILIES.items():
        mine = [p for p in families if p["family"] == family]
        near = min((p["gamma"] for p in mine), key=lambda g: abs(g - 1), default=0)
        if mine:
            share = np.mean([stored(p) for p in mine if p["gamma"] == near], 0)
            ax.plot(range(len(share)), share, "o-", color=colour)
    if heads:
        of_heads = np.array([stored(p) for p in heads])
        levels = np.arange(of_heads.shape[1])
        ax.fill_between(levels, of_heads.min(0), of_heads.max(0), color=HEADS, alpha=0.3, lw=0)
        ax.plot(levels, np.median(of_heads, 0), color=HEADS)
    keys = [
        Line2D([], [], color="black", marker="o", label=r"$\Gamma = 1$, by family"),
        Line2D([], [], color=HEADS, label="real heads"),
    ]
    ax.set_ylim(0, 1.4)
    ax.legend(handles=keys, loc="upper right", handlelength=1.2, labelspacing=0.1)
    ax.set_xlabel("level of the tree")
