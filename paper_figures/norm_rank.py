"""Error over (Gamma, degree), and what the adapter's size and rank do to Gamma and to the features
needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "norm_rank"
DASHES = {"alpha/r": "-", "alpha/sqrt(r)": ":"}
Points = list[dict[str, Any]]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) error against Gamma by degree, odd solid and even dashed, with the range of the seeds; (b)
    Gamma and (c) k* at 0.1 %, interpolated between degrees, against the size of the adapter's
    entries, by rank, for both scalings; bars: the sizes of adapters after training, at three rates;
    (d) k* against Gamma: all ranks and scalings on one curve.
    """
    points = [row["point"] | row["metrics"] for row in rows]
    # rows of an adapter have a seed since k* is interpolated
    adapter = [p for p in points if p["kind"] == "adapter" and "seed" in p]
    fig, axes = style.figure(4.4, 2, 2)
    _errors(axes[0, 0], [p for p in points if p["kind"] == "degrees"])
    _adapters(axes[0, 1], adapter, "gamma")
    style.panel(axes[0, 1], "b", r"$\Gamma$")
    _trained(axes[0, 1], [p for p in points if p["kind"] == "trained"])
    _adapters(axes[1, 0], adapter, "features")
    style.panel(axes[1, 0], "c", r"$k^\star$ at 0.1 %")
    _collapse(axes[1, 1], adapter)
    if adapter:
        style.legend(axes[0, 1], loc="upper left", handlelength=1.2, labelspacing=0.2)
    keys = [
        Line2D([], [], color="black", linestyle="-", label=r"$s=\alpha/r$"),
        Line2D([], [], color="black", linestyle=":", label=r"$s=\alpha/\sqrt{r}$"),
    ]
    axes[1, 0].legend(handles=keys, loc="upper left", handlelength=1.6, labelspacing=0.2)
    return fig


def _errors(ax: Axes, points: Points) -> None:
    style.panel(ax, "a", "relative error, by degree")
    gammas = sorted({p["gamma"] for p in points})
    last = min((len(p["errors"]) for p in points), default=1)
    for degree in range(1, min(last, 9)):
        values = [[p["errors"][degree] for p in points if p["gamma"] == g] for g in gammas]
        colour = style.plt.get_cmap("viridis")(degree / 9)
        mean = [np.exp(np.mean(np.log(v))) for v in values]
        dash = "-" if degree % 2 else "--"
        ax.plot(gammas, mean, dash, color=colour, linewidth=1, label=f"{degree}")
        low, high = [min(v) for v in values], [max(v) for v in values]
        ax.fill_between(gammas, low, high, color=colour, alpha=0.3, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(1e-9, 3)
    ax.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    ax.minorticks_off()
    ax.set_xlabel(r"$\Gamma$")
    tight = {"handlelength": 1.4, "columnspacing": 0.6, "labelspacing": 0.2, "borderaxespad": 0.1}
    style.legend(ax, title="degree", title_fontsize=7, loc="lower right", ncols=2, **tight)


def _value(p: dict[str, Any], name: str) -> float:
    """Gamma, or k* interpolated between degrees; NaN where no degree measured was enough."""
    if name == "gamma":
        return p["gamma"]
    return np.nan if p["interpolated"] is None else p["interpolated"]


def _adapters(ax: Axes, points: Points, name: str) -> None:
    """Gamma or k* against the size of the entries, by rank and scaling; the range of the seeds."""
    for i, rank in enumerate(sorted({p["rank"] for p in points})):
        for convention, dash in DASHES.items():
            mine = [p for p in points if (p["rank"], p["convention"]) == (rank, convention)]
            sizes = sorted({p["size"] for p in mine})
            values = [[_value(p, name) for p in mine if p["size"] == s] for s in sizes]
            if not sizes:
                continue
            label = f"$r={rank}$" if dash == "-" else None
            mean = [np.exp(np.mean(np.log(v))) for v in values]
            colour = style.COLOURS[i]
            ax.plot(sizes, mean, dash, marker="o", markersize=2.5, color=colour, label=label)
            low, high = [min(v) for v in values], [max(v) for v in values]
            ax.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks([0.01, 0.03, 0.1], ["0.01", "0.03", "0.1"])
    ax.minorticks_off()
    style.round_ticks(ax.yaxis)
    ax.set_xlabel("size of entries of $A$, $B$")


def _trained(ax: Axes, points: Points) -> None:
    """Bars above the curves: from the least to the largest size after training, by rank, over rates,
    scalings and seeds.
    """
    if not points:
        return
    style.headroom(ax, 0.45)
    place = ax.get_xaxis_transform()
    for i, rank in enumerate(sorted({p["rank"] for p in points})):
        sizes = [p["size"] for p in points if p["rank"] == rank]
        ends = [min(sizes), max(sizes)]
        height = 0.97 - 0.05 * i
        ax.plot(ends, 2 * [height], color=style.COLOURS[i], linewidth=2.5, transform=place)
    least = min(p["size"] for p in points)
    ax.text(
        least * 0.85, 0.9, "after\ntraining", fontsize=7, ha="right", va="center", transform=place
    )


def _collapse(ax: Axes, points: Points) -> None:
    style.panel(ax, "d", r"$k^\star$ at 0.1 % against $\Gamma$")
    for i, rank in enumerate(sorted({p["rank"] for p in points})):
        mine = [p for p in points if p["rank"] == rank]
        x = [p["gamma"] for p in mine]
        y = [_value(p, "features") for p in mine]
        ax.plot(x, y, "o", markersize=2.5, alpha=0.7, color=style.COLOURS[i], label=f"$r={rank}$")
    ax.set_xscale("log")
    ax.set_yscale("log")
    style.round_ticks(ax.xaxis)
    style.round_ticks(ax.yaxis)
    ax.set_xlabel(r"$\Gamma$")
