"""The phase boundary: speed-up over (L, Gamma) with real heads on it, and the counted exponent
beyond what runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from paper_figures.drawing import style

CONFIG = "phase_boundary"
ALSO = ("real_heads",)
HEAD: dict[str, Any] = {
    "marker": "o",
    "color": "white",
    "markeredgecolor": "black",
    "markeredgewidth": 0.6,
    "markersize": 3,
    "linestyle": "none",
}
SLICES = {"fixed": "d = {d}", "growing": r"d = \lceil\log_2 L\rceil"}


def _grid(rows: list[dict[str, Any]], kind: str):
    """Lengths, gammas and the rows of a slice by (L, Gamma)."""
    cells = {
        (r["point"]["length"], r["point"]["gamma"]): r
        for r in rows
        if r["point"]["kind"] == "measured" and r["point"]["slice"] == kind
    }
    return sorted({n for n, _ in cells}), sorted({g for _, g in cells}), cells


def _values(lengths, gammas, cells, name: str) -> np.ndarray:
    out = np.full((len(gammas), len(lengths)), np.nan)
    for i, g in enumerate(gammas):
        for j, n in enumerate(lengths):
            value = cells[n, g]["metrics"].get(name) if (n, g) in cells else None
            out[i, j] = np.nan if value is None else value
    return out


def _map(ax: Axes, rows: list[dict[str, Any]], kind: str, limit: float):
    """One panel: colour = speed-up, solid = k* crosses L, dashed = Gamma proportional to sqrt(ln
    L).
    """
    lengths, gammas, cells = _grid(rows, kind)
    if not cells:
        return style.empty(ax)
    speed = np.log10(_values(lengths, gammas, cells, "speed_up"))
    ax.set_facecolor(style.GREY)
    image = ax.pcolormesh(
        lengths,
        gammas,
        speed,
        cmap="RdBu",
        norm=style.around_one(limit),
        shading="nearest",
        rasterized=True,
    )
    exponent = _values(lengths, gammas, cells, "exponent")
    # Cells where no degree up to the highest was enough lie beyond the boundary.
    exponent = np.where(np.isnan(exponent), 2.0, exponent)
    if min(exponent.shape) > 1 and exponent.min() < 1 < exponent.max():
        ax.contour(lengths, gammas, exponent, levels=[1.0], colors="black", linewidths=1.4)
    crossing = _crossing(lengths, gammas, exponent)
    if crossing is not None:
        x = np.array([lengths[0] * 0.7, lengths[-1] * 1.42])
        ax.plot(x, crossing * np.sqrt(np.log(x)), "k--", linewidth=1)
    style.powers_of_two(ax, lengths)
    ax.set_yscale("log")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8) if gammas[0] * 0.7 < t < gammas[-1] * 1.5]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(style.edges(lengths)[0], style.edges(lengths)[-1])
    ax.set_ylim(style.edges(gammas)[0], style.edges(gammas)[-1])
    ax.set_xlabel("tokens $L$")
    return image


def _crossing(lengths, gammas, exponent) -> float | None:
    """The constant of Gamma = constant sqrt(ln L) fitted to where log k* / log L crosses 1, column
    by column.
    """
    found = []
    for j, n in enumerate(lengths):
        column = exponent[:, j]
        above = np.flatnonzero(column > 1)
        if len(above) and above[0] > 0:
            i = above[0]
            t = (1 - column[i - 1]) / (column[i] - column[i - 1])
            log_gamma = np.log(gammas[i - 1]) + t * np.log(gammas[i] / gammas[i - 1])
            found.append(np.exp(log_gamma) / np.sqrt(np.log(n)))
    return float(np.median(found)) if found else None


def _counted(ax: Axes, rows: list[dict[str, Any]], kind: str) -> None:
    """log k* / log L at Gamma = ratio sqrt(ln L), counted from Bessel tails, against log2 L."""
    rows = [r for r in rows if r["point"]["kind"] == "counted" and r["point"]["slice"] == kind]
    for i, ratio in enumerate(sorted({r["point"]["ratio"] for r in rows})):
        line = sorted(
            (r["point"]["log2_length"], r["metrics"]["exponent"])
            for r in rows
            if r["point"]["ratio"] == ratio
        )
        ax.plot(*zip(*line, strict=True), "o-", color=style.COLOURS[i], label=rf"${ratio:g}$")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xlabel(r"$\log_2 L$ (counted, not run)")
    ax.set_yscale("log")
    ax.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    ax.minorticks_off()


def draw(rows: list[dict[str, Any]], also: dict[str, list[dict[str, Any]]]) -> Figure:
    """Upper row: measured maps, fixed and growing width. Lower row: the exponent counted to L =
    2^64.
    """
    fig, axes = style.figure(4.6, 2, 2, height_ratios=[1.25, 1])
    speeds = [r["metrics"].get("speed_up") for r in rows if r["point"]["kind"] == "measured"]
    limit = max([abs(np.log10(s)) for s in speeds if s] + [0.3])
    width = next((r["point"]["width"] for r in rows if r["point"]["slice"] == "fixed"), 0)
    image = None
    for j, (kind, label) in enumerate(SLICES.items()):
        title = "$" + label.replace("{d}", str(width)) + "$"
        image = _map(axes[0, j], rows, kind, limit) or image
        style.panel(axes[0, j], "ab"[j], title)
        _counted(axes[1, j], rows, kind)
        style.panel(axes[1, j], "cd"[j], title)
        _heads(axes[0, j], also.get("real_heads", []))
    axes[0, 0].set_ylabel(r"norm bound $\Gamma$  ($\beta = 1/d$, $R \leq \Gamma^2$)")
    axes[1, 0].set_ylabel(r"$\log k^\star / \log L$")
    if axes[1, 0].get_legend_handles_labels()[0]:
        axes[1, 0].legend(
            title=r"$\Gamma/\sqrt{\ln L}$", title_fontsize=7, loc="upper right", ncols=3
        )
    keys = [
        Line2D([], [], color="black", linewidth=1.4, label="$k^\\star = L$, measured"),
        Line2D(
            [],
            [],
            color="black",
            linestyle="--",
            linewidth=1,
            label=r"$\Gamma \propto \sqrt{\ln L}$",
        ),
        Line2D([], [], **HEAD, label=r"real heads, $\Gamma = \sqrt{R}$"),
        Patch(color=style.GREY, label="not timed: $k^\\star$ too large"),
    ]
    fig.legend(
        handles=keys, loc="outside upper center", ncols=4, columnspacing=1.2, handletextpad=0.5
    )
    if image is not None:
        bar = fig.colorbar(image, ax=axes[0, :].tolist(), pad=0.02, aspect=18)
        ticks = [t for t in (0.01, 0.1, 1, 10, 100, 1000) if abs(np.log10(t)) <= limit]
        bar.set_ticks(list(np.log10(ticks)), labels=[f"{t:g}" for t in ticks])
        bar.set_label("speed-up over best exact")
    return fig


def _heads(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Real heads at their length and at the Gamma whose R they have, jittered sideways; arrows
    leave the map.
    """
    high = ax.get_ylim()[1]
    for i, row in enumerate(rows):
        gamma = float(np.sqrt(row["metrics"]["score_max_centred"]))
        x = 512 * 2 ** (0.8 * ((i * 0.618) % 1 - 0.5))
        above = gamma > high
        marker: dict[str, Any] = HEAD | {"marker": "^" if above else "o"}
        ax.plot(x, high * 0.95 if above else gamma, clip_on=False, **marker)
