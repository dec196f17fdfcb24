"""Error over (Gamma, features), and what the adapter's size and rank do to Gamma and to the
features needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from paper_figures.drawing import style

CONFIG = "norm_rank"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) error map; (b) Gamma and (c) k* against the size of the adapter's entries, by rank and
    scaling.
    """
    fig, axes = style.figure(2.4, 1, 3, width_ratios=[1.25, 1, 1])
    image = _errors(axes[0, 0], [r for r in rows if r["point"]["kind"] == "error"])
    style.panel(axes[0, 0], "a", "relative error")
    if image is not None:
        bar = fig.colorbar(image, ax=axes[0, 0], pad=0.02, aspect=22)
        powers = [-8, -6, -4, -2, 0]
        bar.set_ticks(powers, labels=[f"$10^{{{p}}}$" if p else "1" for p in powers])
    _adapters(axes[0, 1], axes[0, 2], [r for r in rows if r["point"]["kind"] == "adapter"])
    return fig


def _errors(ax: Axes, rows: list[dict[str, Any]]) -> QuadMesh | None:
    """Error over (Gamma, k) with contours at 1e-4, 1e-2 and 0.1; None where there are no rows."""
    if not rows:
        return style.empty(ax)
    gammas = sorted({r["point"]["gamma"] for r in rows})
    features = sorted({r["metrics"]["features"] for r in rows})
    grid = np.full((len(features), len(gammas)), np.nan)
    for r in rows:
        value = r["metrics"]["max_error"]
        place = features.index(r["metrics"]["features"]), gammas.index(r["point"]["gamma"])
        grid[place] = np.log10(value) if value and np.isfinite(value) else np.nan
    ax.set_facecolor(style.GREY)
    look: dict[str, Any] = {"cmap": "cividis_r", "vmin": -8, "vmax": 0}
    image = ax.pcolormesh(gammas, features, grid, shading="nearest", rasterized=True, **look)
    if min(grid.shape) > 1:
        # A failed cell lies beyond every contour.
        filled = np.nan_to_num(grid, nan=1)
        white: dict[str, Any] = {"colors": "white", "linewidths": 0.8, "linestyles": "solid"}
        lines = ax.contour(gammas, features, filled, levels=[-4, -2, -1], **white)
        ax.clabel(lines, fmt=lambda v: f"$10^{{{int(v)}}}$", fontsize=6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    ax.minorticks_off()
    ax.set_xlim(style.edges(gammas)[0], style.edges(gammas)[-1])
    ax.set_xlabel(r"$\Gamma$")
    ax.set_ylabel("features $k$")
    return image


def _adapters(norm: Axes, width: Axes, adapter: list[dict[str, Any]]) -> None:
    """Gamma and k* against the size of the adapter's entries, by rank and scaling."""
    for ax in () if adapter else (norm, width):
        style.empty(ax)
    for i, rank in enumerate(sorted({r["point"]["rank"] for r in adapter})):
        for convention, dash in (("alpha/r", "-"), ("alpha/sqrt(r)", ":")):
            line = sorted(
                (r["point"]["size"], r["metrics"]["gamma"], r["metrics"]["features"])
                for r in adapter
                if r["point"]["rank"] == rank and r["point"]["convention"] == convention
            )
            if not line:
                continue
            size, gamma, need = zip(*line, strict=True)
            need = [np.nan if n is None else n for n in need]
            label = f"$r={rank}$" if dash == "-" else None
            norm.plot(
                size, gamma, dash, marker="o", markersize=2.5, color=style.COLOURS[i], label=label
            )
            width.plot(
                size, need, dash, marker="o", markersize=2.5, color=style.COLOURS[i], label=label
            )
    for ax, letter, title in ((norm, "b", r"$\Gamma$"), (width, "c", r"$k^\star$ at 1 %")):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
        ax.minorticks_off()
        ax.set_xlabel("size of entries of $A$, $B$")
        style.panel(ax, letter, title)
    style.legend(norm, loc="upper left", handlelength=1.2, labelspacing=0.2)
    width.plot([], [], "k-", label=r"$s=\alpha/r$")
    width.plot([], [], "k:", label=r"$s=\alpha/\sqrt{r}$")
    handles, labels = width.get_legend_handles_labels()
    width.legend(handles[-2:], labels[-2:], loc="upper left", handlelength=1.6, labelspacing=0.2)
