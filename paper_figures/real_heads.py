"""Real heads against the theorems' conditions, and the error that each degree reaches on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from paper_figures.drawing import style

CONFIG = "real_heads"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) centred against raw score range; (b) error by degree; (c) features needed at each
    tolerance.
    """
    fig, axes = style.figure(2.5, 1, 3)
    layers = sorted({r["point"]["layer"] for r in rows})
    for row in rows:
        colour = style.COLOURS[layers.index(row["point"]["layer"])]
        m = row["metrics"]
        axes[0, 0].plot(m["score_std"], m["score_std_centred"], "o", color=colour)
        errors = np.minimum(np.array(m["errors"], float), 1e3)
        axes[0, 1].plot(
            np.arange(1, len(errors) + 1), errors, color=colour, linewidth=0.7, alpha=0.8
        )
        for i, needed in enumerate(m["needed"].values()):
            k = needed["features"]
            y = math.log10(k) if k else np.nan
            axes[0, 2].plot(
                m["score_max_centred"],
                y,
                "os"[i % 2],
                color=colour,
                fillstyle="full" if i == 0 else "none",
            )
    ax = axes[0, 0]
    top = max(r["metrics"]["score_std"] for r in rows) * 1.2
    ax.plot([0.3, top], [0.3, top], color="black", linewidth=0.6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("std of scores, raw")
    ax.set_ylabel("std of scores, centred")
    style.panel(ax, "a", "centring")
    for i, layer in enumerate(layers):
        ax.plot([], [], "o", color=style.COLOURS[i], label=f"layer {layer}")
    ax.legend(loc="upper left", handletextpad=0.2)
    ax = axes[0, 1]
    ax.set_yscale("log")
    ax.set_ylim(1e-6, 1e3)
    ax.axhline(0.1, color="black", linewidth=0.6, linestyle="--")
    ax.axhline(0.01, color="black", linewidth=0.6, linestyle=":")
    ax.set_xlabel("degree $g$")
    style.panel(ax, "b", "relative error")
    ax = axes[0, 2]
    ax.set_xscale("log")
    ticks = [r for r in (5, 10, 20, 40)]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("centred score range $R$")
    low, high = ax.get_ylim()
    marks = np.arange(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    ax.set_yticks(list(marks), [f"$10^{{{m}}}$" for m in marks])
    style.panel(ax, "c", r"features $k^\star$ needed")
    lost = sum(any(n["features"] is None for n in r["metrics"]["needed"].values()) for r in rows)
    if lost:
        ax.text(
            0.98,
            0.02,
            f"{lost} of {len(rows)} heads need\nmore than degree 24",
            transform=ax.transAxes,
            fontsize=6,
            ha="right",
        )
    ax.plot([], [], "o", color="black", label="10 %")
    ax.plot([], [], "s", color="black", fillstyle="none", label="1 %")
    ax.legend(loc="upper left", handletextpad=0.2)
    return fig
