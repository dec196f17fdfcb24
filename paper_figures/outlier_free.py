"""Table 1 of the paper beside its theory: what softmax_1 does to norms, to the width needed and to
the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.numbers.outlier_free import (
    FAMILIES,
    PAPER,
    TOLERANCE,
    approximate_saving,
    errors_by_width,
    features,
    models,
    part,
    step_saving,
    table,
    uncertainty,
)

__all__ = ["draw", "table"]

CONFIG = "outlier_free"
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, _ = style.COLOURS
LOOKS = {"softmax": (RED, "o"), "softmax_1": (BLUE, "s")}
FACTORS = {"svd": (BLACK, "D"), "sparse": (GREEN, "s"), "skeleton": (ORANGE, "^")}
NORMS = {
    "gamma": r"$\Gamma/\sqrt{\ln L}$",
    "score": r"$R/\ln L$",
    "largest": "largest\nentry",
    "kurtosis": "kurtosis",
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) norms and outliers, bars over the seeds; (b) error of the head gradients by width, median
    head; (c) time saved by softmax_1.
    """
    fig, axes = style.figure(2.6, 1, 3, width_ratios=(1.1, 1, 1.1))
    _norms(axes[0, 0], rows)
    style.panel(axes[0, 0], "a", "norms and outliers")
    _errors(axes[0, 1], rows)
    style.panel(axes[0, 1], "b", "relative error")
    _saved(axes[0, 2], rows)
    style.panel(axes[0, 2], "c", "time saved (%)")
    return fig


def _norms(ax: Axes, rows: list[dict[str, Any]]) -> None:
    names = models(rows)
    for row in features(rows):
        colour, marker = LOOKS[row["attention"]]
        for i, norm in enumerate(NORMS):
            x = i + 0.22 * (names.index(row["model"]) - (len(names) - 1) / 2)
            # The two attentions of a model side by side.
            x += 0.05 if row["attention"] == "softmax_1" else -0.05
            seeds = row["norms"][norm]
            middle = float(np.median(seeds))
            bars = [[middle - min(seeds)], [max(seeds) - middle]]
            ax.errorbar(x, middle, bars, fmt=marker, color=colour, markersize=4, elinewidth=0.7)
    ax.set_yscale("log")
    ax.set_ylim(0.8, 400)
    ax.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    ax.minorticks_off()
    ax.set_xticks(range(len(NORMS)), list(NORMS.values()), fontsize=6)
    ax.text(0.02, 0.02, ", ".join(names), transform=ax.transAxes, fontsize=6)
    ax.tick_params(axis="x", length=0)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=_label(attention))
        for attention, (colour, marker) in LOOKS.items()
    ]
    ax.legend(
        handles=handles,
        loc="upper left",
        ncols=2,
        handletextpad=0,
        columnspacing=0.6,
        borderaxespad=0.1,
    )


def _label(attention: str) -> str:
    return r"softmax$_1$" if attention == "softmax_1" else attention


def _errors(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Over all models, heads and LoRA ranks; solid: softmax, dashed: softmax_1."""
    ticks = sorted({int(n.split()[1]) for row in features(rows) for n in _factors(row)})
    if not ticks:
        return style.empty(ax)
    for family, (colour, marker) in FACTORS.items():
        for attention, dash in (("softmax", "-"), ("softmax_1", "--")):
            found = errors_by_width(rows, family, attention)
            widths = sorted(found)
            face = colour if attention == "softmax" else "white"
            look: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": face}
            look["linestyle"] = dash
            # A head without a number is one of the worst, not one that is left out.
            errors = [np.nan_to_num(found[k], nan=np.inf) for k in widths]
            ax.plot(widths, [np.median(each) for each in errors], **look)
    ax.axhline(TOLERANCE, color=BLACK, linewidth=0.7, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.set_xlabel("width $k$ (of 257 keys)")
    style.headroom(ax, 0.4)
    below: dict[str, Any] = {"textcoords": "offset points", "va": "top"}
    ax.annotate("10 %", (1.5 * ticks[0], TOLERANCE), (0, -1), fontsize=6, **below)
    handles = [
        Line2D([], [], color=colour, marker=marker, label=FAMILIES[family])
        for family, (colour, marker) in FACTORS.items()
    ]
    handles.append(Line2D([], [], color=style.GREY, linestyle="--", label=r"dashed: softmax$_1$"))
    ax.legend(
        handles=handles, loc="upper right", handlelength=1.4, labelspacing=0.15, borderaxespad=0.1
    )


def _factors(row: dict[str, Any]) -> list[str]:
    return [
        name for errors in row["errors"].values() for name in errors if name.split()[0] in FAMILIES
    ]


def _saved(ax: Axes, rows: list[dict[str, Any]]) -> None:
    names = models(rows)
    x = np.arange(len(names))
    paper = [100 * (1 - PAPER[name][1] / PAPER[name][0]) for name in names]
    ax.bar(x, paper, 0.7, color=style.GREY, zorder=0)
    looks = {
        "softmax_1": (BLUE, "s", r"softmax$_1$"),
        "stretched": (RED, "o", "softmax, larger scores"),
    }
    for row in part(rows, "step"):
        for name, (colour, marker, _) in looks.items():
            # Before, on and after the bar of Table 1.
            at = names.index(row["model"]) + (-0.2 if name == "softmax_1" else 0)
            saved = step_saving(row, name), uncertainty(row, name)
            ax.errorbar(at, *saved, fmt=marker, color=colour, elinewidth=0.7)
        at = names.index(row["model"]) + 0.2
        saved = approximate_saving(rows, row["model"], row["rank"])
        ax.plot(at, saved, "D", color=BLACK, fillstyle="none")
    ax.axhline(0, color=BLACK, linewidth=0.6)
    ax.set_xticks(x, names)
    handles = [Line2D([], [], color=style.GREY, linewidth=5, label="Table 1 (paper)")]
    handles += [
        Line2D([], [], color=c, marker=m, linestyle="none", label=label)
        for c, m, label in looks.values()
    ]
    hollow: dict[str, Any] = {"marker": "D", "fillstyle": "none", "linestyle": "none"}
    handles.append(Line2D([], [], color=BLACK, label="approximate, 10 % error", **hollow))
    tight: dict[str, Any] = {"handlelength": 1.2, "labelspacing": 0.15, "borderaxespad": 0.1}
    ax.legend(handles=handles, loc="upper left", **tight)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.7 * (high - low))
