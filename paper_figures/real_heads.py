"""Real heads against the theorems' conditions, and the error that each degree reaches on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style

CONFIG = "real_heads"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) centred against raw score range; (b) error by degree; (c) features needed at each
    tolerance.
    """
    fig, axes = style.figure(2.5, 1, 3)
    layers = sorted({row["point"]["layer"] for row in rows})
    colours = {layer: style.COLOURS[i] for i, layer in enumerate(layers)}
    _centring(axes[0, 0], rows, colours)
    style.panel(axes[0, 0], "a", "centring")
    _errors(axes[0, 1], rows, colours)
    style.panel(axes[0, 1], "b", "relative error")
    _features(axes[0, 2], rows, colours)
    style.panel(axes[0, 2], "c", r"features $k^\star$ needed")
    return fig


def _centring(ax: Axes, rows: list[dict[str, Any]], colours: dict[int, str]) -> None:
    """Standard deviation of the scores of each head, centred against raw."""
    for row in rows:
        spread = row["metrics"]["score_std"], row["metrics"]["score_std_centred"]
        ax.plot(*spread, "o", color=colours[row["point"]["layer"]])
    # On the line centring would gain nothing.
    top = max(row["metrics"]["score_std"] for row in rows) * 1.2
    ax.plot([0.3, top], [0.3, top], color="black", linewidth=0.6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("std of scores, raw")
    ax.set_ylabel("std of scores, centred")
    for layer, colour in colours.items():
        ax.plot([], [], "o", color=colour, label=f"layer {layer}")
    ax.legend(loc="upper left", handletextpad=0.2)


def _errors(ax: Axes, rows: list[dict[str, Any]], colours: dict[int, str]) -> None:
    """Relative error of each head by degree; lines at 10 and 1 %."""
    for row in rows:
        # Beyond 1000 times the gradient an error is drawn at the top, if it is a number at all.
        errors = np.minimum(np.array(row["metrics"]["errors"], float), 1e3)
        degrees = np.arange(1, len(errors) + 1)
        ax.plot(degrees, errors, color=colours[row["point"]["layer"]], linewidth=0.7, alpha=0.8)
    ax.set_yscale("log")
    ax.set_ylim(1e-6, 1e3)
    ax.axhline(0.1, color="black", linewidth=0.6, linestyle="--")
    ax.axhline(0.01, color="black", linewidth=0.6, linestyle=":")
    ax.set_xlabel("degree $g$")


def _features(ax: Axes, rows: list[dict[str, Any]], colours: dict[int, str]) -> None:
    """Features that each head needs, by its centred score range and tolerance."""
    for row in rows:
        for i, needed in enumerate(row["metrics"]["needed"].values()):
            k = needed["features"]
            y = math.log10(k) if k else np.nan
            look: dict[str, Any] = {
                "color": colours[row["point"]["layer"]],
                "fillstyle": "full" if i == 0 else "none",
            }
            ax.plot(row["metrics"]["score_max_centred"], y, "os"[i % 2], **look)
    ax.set_xscale("log")
    ticks = (5, 10, 20, 40)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("centred score range $R$")
    # The axis is linear in log10 k: heads for which no degree is enough must not set its limits.
    low, high = ax.get_ylim()
    marks = np.arange(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    ax.set_yticks(list(marks), [f"$10^{{{m}}}$" for m in marks])
    lost = sum(any(n["features"] is None for n in r["metrics"]["needed"].values()) for r in rows)
    if lost:
        said = f"{lost} of {len(rows)} heads need\nmore than degree 24"
        ax.text(0.98, 0.02, said, transform=ax.transAxes, fontsize=6, ha="right")
    ax.plot([], [], "o", color="black", label="10 %")
    ax.plot([], [], "s", color="black", fillstyle="none", label="1 %")
    ax.legend(loc="upper left", handletextpad=0.2)
