"""Deciding nearest neighbours by LoRA gradients: who answers right against Gamma and against k, and
the quadratures.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from paper_figures.drawing import style

CONFIG = "hardness"
BLUE, RED, GREEN, _, ORANGE, _, BLACK, _ = style.COLOURS
# A marker to each colour, so that colour is never the only cue.
FAMILIES = {
    "svd": (RED, "D", "SVD of $f$"),
    "columns": (GREEN, "^", "$k$ columns of $f$"),
    "chebyshev": (BLUE, "s", "polynomial"),
    "polynomial": (ORANGE, "v", "library, degree 2"),
}
RULES = {
    "left_riemann": (RED, "v", r"left Riemann, $\ln^4 n$ nodes"),
    "gauss_12": (GREEN, "^", "Gauss-Legendre, 12"),
    "gauss_16": (ORANGE, "D", "Gauss-Legendre, 16"),
    "gauss_24": (BLUE, "s", "Gauss-Legendre, 24"),
}
LEGEND = {"handlelength": 1.2, "labelspacing": 0.2, "borderaxespad": 0.1}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Three panels: right answers against Gamma / sqrt(ln n), against k at the Gamma needed, and
    quadrature errors.

    (a) pools random instances and clustered ones, the worst case: every pair but a planted one is
    as near as a NO may be. (b) shows the random ones, where a pair hides in one column of f. Bands
    (in (a) of the exact oracle): Wilson's 95 % intervals of the share.
    """
    decisions = [
        row["point"] | row["metrics"] for row in rows if row["point"]["panel"] == "decision"
    ]
    quadratures = [
        row["point"] | row["metrics"] for row in rows if row["point"]["panel"] == "quadrature"
    ]
    figure, axes = style.figure(2.9, 1, 3, width_ratios=(1.1, 1.1, 1))
    panels = axes[0]
    for letter, title, axis in zip(
        "abc", ("against the norm", "against the width", "quadrature"), panels, strict=True
    ):
        style.panel(axis, letter, title)
    # The largest n at which every family was tried.
    n = max((row["n"] for row in decisions if row["family"] == "columns"), default=0)
    if decisions:
        _against_gamma(panels[0], decisions, n)
        _against_width(
            panels[1], [row for row in decisions if row["n"] == n and row["strength"] == 1.0]
        )
    if quadratures:
        _quadrature(panels[2], sorted(quadratures, key=lambda row: row["n"]))
    return figure


def _line(axis: Axes, rows: list[dict[str, Any]], x: str, y: str, **look: Any) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    axis.plot([row[x] for row in rows], [row[y] for row in rows], **look)


def _shares(axis: Axes, rows: list[dict[str, Any]], x: str, y: str, **look: Any) -> None:
    """A line of shares of right answers, in the band of their intervals."""
    _line(axis, rows, x, y, **look)
    rows = sorted(rows, key=lambda row: row[x])
    # Half of the decisions are of either kind of instance.
    counts = [row["decisions"] // (1 if y == "right" else 2) for row in rows]
    found: list[Any] = [
        stats.binomtest(round(row[y] * count), count).proportion_ci(method="wilson")
        for row, count in zip(rows, counts, strict=True)
    ]
    ends = [ci.low for ci in found], [ci.high for ci in found]
    pale: dict[str, Any] = {"color": look["color"], "alpha": 0.12, "linewidth": 0}
    axis.fill_between([row[x] for row in rows], *ends, **pale)


def _share(axis: Axes) -> None:
    axis.axhline(0.5, color=style.GREY, linewidth=0.6, linestyle=":", zorder=0)
    axis.set_ylim(0.28, 1.6)  # room above for the legend
    axis.set_yticks([0.5, 0.75, 1.0])


def _two_sizes(rows: list[dict[str, Any]]) -> list[int]:
    """A small and a large size short of k = L: a panel holds no more."""
    sizes = sorted({row["size"] for row in rows if row["size"] < row["tokens"]})
    return sorted({sizes[len(sizes) // 3], sizes[-1]}) if sizes else []


def _against_gamma(axis: Axes, rows: list[dict[str, Any]], n: int) -> None:
    _share(axis)
    for family, symbol in (("columns", "k"), ("chebyshev", "g")):
        colour, marker, _ = FAMILIES[family]
        mine = [row for row in rows if row["family"] == family and row["n"] == n]
        for face, size in zip(("white", colour), _two_sizes(mine), strict=False):
            name = f"{'columns' if family == 'columns' else 'polynomial'}, ${symbol}={size}$"
            look = {"color": colour, "marker": marker, "markerfacecolor": face, "linewidth": 0.9}
            curve = [row for row in mine if row["size"] == size]
            _line(axis, curve, "gamma_ratio", "right", label=name, **look)
    exact = [row for row in rows if row["family"] == "exact"]
    lengths = sorted({row["n"] for row in exact})
    for length, marker in zip(sorted({*lengths[:1], *lengths[-1:]}), "oD", strict=False):
        face = BLACK if length == n else "white"
        look = {"color": BLACK, "marker": marker, "markerfacecolor": face}
        curve = [row for row in exact if row["n"] == length]
        _shares(axis, curve, "gamma_ratio", "right", label=f"exact, $n={length}$", **look)
        for row in curve:
            if row["strength"] == 1.0:
                # What the gadget needs in the worst case.
                level: dict[str, Any] = {"color": style.GREY, "linewidth": 0.6, "linestyle": "--"}
                axis.axvline(row["gamma_ratio"], zorder=0, **level)
    own = [row for row in exact if row["n"] == n]
    split = [row["gamma_ratio"] for row in own if row["right_random"] > row["right_clustered"]]
    if split:
        where = (sum(split) / len(split), 0.46)
        place: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 7, "linespacing": 1.0}
        axis.annotate("random right,\nclustered not", where, **place)
    axis.set_xlabel(r"$\Gamma / \sqrt{\ln n}$   ($\beta = 1/d$)")
    axis.set_ylabel("right answers")
    style.legend(axis, loc="upper left", **LEGEND)


def _against_width(axis: Axes, rows: list[dict[str, Any]]) -> None:
    _share(axis)
    if not rows:
        return style.empty(axis)
    tokens = rows[0]["tokens"]
    n = rows[0]["n"]
    for family, (colour, marker, label) in FAMILIES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            look = {
                "color": colour,
                "marker": marker,
                "label": label,
                "linestyle": "-" if mine[1:] else "",
            }
            _shares(axis, mine, "k", "right_random", **look)
    # The planted pair lies in a column that was drawn with probability k / L; a NO is always seen
    # as one.
    ks = [tokens * 10 ** (-step / 20) for step in range(round(20 * math.log10(tokens)) + 1)]
    axis.plot(
        ks, [0.5 + k / tokens / 2 for k in ks], color=GREEN, linestyle="--", linewidth=0.7, zorder=0
    )
    axis.axvline(tokens, color=style.GREY, linewidth=0.6, linestyle="--", zorder=0)
    axis.annotate("$k=L$", (tokens, 0.3), xytext=(3, 0), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlabel(f"$k$   ($n={n}$, random)")
    axis.tick_params(labelleft=False)
    style.legend(axis, loc="upper right", **LEGEND)


def _quadrature(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for name, (colour, marker, label) in RULES.items():
        _line(axis, rows, "n", name, color=colour, marker=marker, label=label)
    axis.axhline(1 / 16, color=BLACK, linewidth=0.7, linestyle="--")
    axis.annotate(
        "allowed: 1/16",
        (rows[0]["n"], 1 / 16),
        xytext=(0, -7),
        textcoords="offset points",
        fontsize=7,
    )
    style.powers_of_two(axis, [row["n"] for row in rows])
    axis.set_yscale("log")
    # Room below the curves for the legend.
    axis.set_ylim(10 ** math.floor(math.log10(min(row["gauss_24"] for row in rows)) - 5), 10.0)
    axis.set_xlabel("$n$")
    axis.set_ylabel("error")
    axis.legend(loc="lower left", **LEGEND)
