"""The phase boundary: the features that a LoRA gradient needs over (L, norm), for typical inputs and
the worst case, which method would be picked, and the law behind it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import boundary, style

CONFIG = "phase_boundary"
FAMILIES: dict[str, tuple[str, str, Any]] = {
    "uniform": ("uniform", style.COLOURS[0], "-"),
    "gaussian": ("gaussian", style.COLOURS[2], "-"),
    "outliers": ("outliers", style.COLOURS[4], "-"),
    "gadget": ("hardness gadget", style.COLOURS[1], "-"),
}
TYPICAL = "uniform"
COUNTED: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 0.9}
EVEN: dict[str, Any] = {"color": "white", "linestyle": "-", "linewidth": 1.0}
HEIGHTS = (-6, 2)  # log2 of R / ln L
# exact, then degrees
PICKS = ["#BBBBBB", "#FDE725", "#9BD93C", "#4AC16D", "#1F9A8A", "#365C8D", "#46327E"]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a-d) colour: log k* / log L of uniform inputs, by width and tolerance; lines: where k* = L,
    by family, with the band of the seeds (the gadget is the worst case for polynomials); white:
    where time breaks even with the best exact gradient; dashed: k* = L by the bound alone, counted.
    (e, f) the fastest gradient that meets the tolerance, uniform inputs, d = log2 L. (g) the law k*
    = binom(d + g, g), g the degree of Taylor's remainder at rho = c R, one c a family: predicted
    against measured. (h) tolerance 1/L beyond what runs: the law for uniform inputs, the bound for
    the worst case.
    """
    points = [row["point"] | row["metrics"] for row in rows]
    cells = [p for p in points if p["kind"] == "accuracy"]
    fig, axes = style.figure(8.2, 4, 2, height_ratios=[1.2, 1.2, 0.9, 1])
    image = None
    for i, kind in enumerate(("fixed", "growing")):
        every = _slice(cells, kind)
        times = boundary.clock(boundary.select(points, kind="time", slice=kind))
        for j, tolerance in enumerate(boundary.TOLERANCES):
            image = _map(axes[i, j], every, times, tolerance) or image
            label = f"$d = {every[0]['width']}$" if kind == "fixed" and every else "$d = 8$"
            label = r"$d = \lceil\log_2 L\rceil$" if kind == "growing" else label
            style.panel(
                axes[i, j], "abcd"[2 * i + j], f"{label}, error {boundary.TOLERANCES[tolerance]}"
            )
        axes[i, 0].set_ylabel(r"$R / \ln L$")
    growing = boundary.select(_slice(cells, "growing"), family=TYPICAL)
    times = boundary.clock(boundary.select(points, kind="time", slice="growing"))
    for j, tolerance in enumerate(boundary.TOLERANCES):
        _picks(axes[2, j], growing, times, tolerance)
        style.panel(axes[2, j], "ef"[j], f"which to pick, error {boundary.TOLERANCES[tolerance]}")
    axes[2, 0].set_ylabel(r"$R / \ln L$")
    laws = {f: boundary.fit(boundary.select(cells, family=f)) for f in FAMILIES}
    _law(axes[3, 0], laws)
    _continued(axes[3, 1], [p for p in points if p["kind"] == "counted"], laws[TYPICAL])
    _keys(fig, {p["family"] for p in cells})
    if image is not None:
        bar = fig.colorbar(image, ax=axes[:2, :].ravel().tolist(), pad=0.02, aspect=30)
        bar.set_label(r"$\log k^\star / \log L$, uniform inputs")
        bar.ax.axhline(1, color="black", linewidth=0.8)
    return fig


def _slice(cells: boundary.Points, kind: str) -> boundary.Points:
    """Cells at the growing width, or at the largest of the fixed ones."""
    mine = boundary.select(cells, slice=kind)
    if kind == "growing" or not mine:
        return mine
    return boundary.select(mine, width=max(p["width"] for p in mine))


def _axes(ax: Axes, cells: boundary.Points) -> None:
    """log2 L across, R / ln L up, and Gamma / sqrt(ln L) on the right."""
    powers = sorted({round(math.log2(p["length"])) for p in cells}) or [9, 16]
    ax.set_xlim(powers[0] - 0.5, powers[-1] + 0.5)
    ax.set_ylim(*HEIGHTS)
    ax.set_xticks([t for t in powers if t % 2 == 0] if len(powers) > 4 else powers)
    ax.set_xlabel(r"$\log_2 L$")
    ticks = range(HEIGHTS[0], HEIGHTS[1] + 1, 2)
    ax.set_yticks(list(ticks), [_power(t) for t in ticks])
    if not ax.get_subplotspec().is_last_col():  # pyright: ignore
        return
    right = ax.secondary_yaxis("right", functions=(_half, _twice))
    right.set_yticks([t / 2 for t in ticks], [_power(t // 2) for t in ticks])
    right.set_ylabel(r"$\Gamma/\sqrt{\ln L}$", fontsize=7)


def _half(y: Any) -> Any:
    return y / 2


def _twice(y: Any) -> Any:
    return 2 * y


def _power(t: int) -> str:
    return f"{2**t}" if t >= 0 else f"1/{2**-t}"


def _map(ax: Axes, cells: boundary.Points, times: boundary.Clock | None, tolerance: str):
    """One panel of the map; the image, or None without cells."""
    _axes(ax, cells)
    typical = boundary.select(cells, family=TYPICAL)
    if not typical:
        return None
    x, y, z = boundary.grid(typical, tolerance)
    ax.set_facecolor(style.GREY)
    image = None
    if min(z.shape) > 1:
        look: dict[str, Any] = {"cmap": "viridis_r", "vmin": 0, "vmax": 1.5}
        image = ax.pcolormesh(x, y, z, shading="nearest", rasterized=True, **look)
    for family, (_, colour, dash) in FAMILIES.items():
        curve = boundary.width_crossing(boundary.select(cells, family=family), tolerance, level=1.0)
        if curve is not None:
            ax.plot(curve.x, curve.mean, dash, color="white", linewidth=2.2)
            ax.plot(curve.x, curve.mean, dash, color=colour, linewidth=1.4)
            ax.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.4, linewidth=0)
    if times is not None:
        timed = [p for p in typical if times.covers(p)]
        even = boundary.crossing(timed, boundary.slowdown(times, tolerance), level=0.0)
        if even is not None:
            ax.plot(even.x, even.mean, **EVEN)
    powers = np.linspace(*ax.get_xlim(), 30)
    widths = [p["width"] if p["slice"] == "fixed" else None for p in cells[:1]]
    bound = [
        boundary.predicted_height(
            n, widths[0] or n, 2.0**-n if tolerance == "1/L" else 0.01, share=1.0
        )
        for n in powers
    ]
    ax.plot(powers, bound, **COUNTED)
    return image


def _picks(ax: Axes, cells: boundary.Points, times: boundary.Clock | None, tolerance: str) -> None:
    """Colour: the degree of the polynomial gradient where it is faster than the best exact one."""
    cells = [p for p in cells if times is not None and times.covers(p)]
    _axes(ax, cells)
    if times is None or not cells:
        return
    slower = boundary.slowdown(times, tolerance)
    lengths = sorted({p["length"] for p in cells})
    gammas = sorted({p["gamma"] for p in cells})
    x, y = np.meshgrid(np.log2(lengths), np.zeros(len(gammas)))
    z = np.full(x.shape, np.nan)
    for j, n in enumerate(lengths):
        for i, gamma in enumerate(gammas):
            y[i, j] = math.log2(gamma**2 / math.log(n))
            here = boundary.select(cells, length=n, gamma=gamma)
            if here:
                # of an odd number of seeds what most of them say
                picks = [0 if slower(p) >= 0 else max(p[tolerance]["degree"], 1) for p in here]
                z[i, j] = min(float(np.median(picks)), len(PICKS) - 1)
    norm = BoundaryNorm(np.arange(len(PICKS) + 1) - 0.5, len(PICKS))
    image = ax.pcolormesh(
        x, y, z, cmap=ListedColormap(PICKS), norm=norm, shading="nearest", rasterized=True
    )
    if not ax.get_subplotspec().is_last_col():  # pyright: ignore
        return
    bar = ax.figure.colorbar(image, ax=ax, pad=0.22, aspect=14)
    names = ["exact", *(f"{g}" for g in range(1, len(PICKS) - 1)), f"{len(PICKS) - 1}+"]
    bar.set_ticks(list(range(len(PICKS))), labels=names)
    bar.ax.set_title("degree", fontsize=7)


def _law(ax: Axes, laws: dict[str, boundary.Law | None]) -> None:
    """Measured against predicted exponents of every cell, in the colour of its family."""
    style.panel(ax, "g", "the law: $\\rho = c\\,R$")
    for family, (label, colour, _) in FAMILIES.items():
        law = laws[family]
        if law is None:
            continue
        x = [p["predicted"] for p in law.cells]
        y = [p["measured"] for p in law.cells]
        off = np.std(np.subtract(y, x))
        text = f"{label}: $c = {law.share:.2g}$ ($\\pm {off:.2f}$)"
        ax.plot(x, y, ".", markersize=1.5, color=colour, alpha=0.5, rasterized=True)
        ax.plot([], [], ".", markersize=4, color=colour, label=text)
    ax.plot([0, 2], [0, 2], color="black", linewidth=0.7)
    ax.set_xlim(0.1, 1.8)
    ax.set_ylim(0.1, 2.7)
    ax.set_xlabel(r"$\log k^\star / \log L$ predicted")
    ax.set_ylabel("measured")
    if any(laws.values()):
        look: dict[str, Any] = {"handlelength": 0.5, "labelspacing": 0.1, "handletextpad": 0.3}
        ax.legend(loc="upper left", borderaxespad=0, **look)


def _continued(ax: Axes, rows: boundary.Points, law: boundary.Law | None) -> None:
    """Exponents at Gamma = kappa sqrt(ln L) to L = 2^64: counted by the bound, by the law."""
    style.panel(ax, "h", r"$d = \log_2 L$, error $1/L$, counted")
    rows = boundary.select(rows, slice="growing")
    powers = np.linspace(8, 64, 57)
    for i, kappa in enumerate(sorted({r["ratio"] for r in rows})):
        line = sorted((r["log2_length"], r["exponent"]) for r in boundary.select(rows, ratio=kappa))
        colour = style.COLOURS[i]
        ax.plot(*zip(*line, strict=True), "--", color=colour, linewidth=0.9)
        if law is not None:
            ax.plot(powers, boundary.continued(powers, law.share, kappa), color=colour)
        ax.annotate(f"{kappa:g}", (65, line[-1][1]), color=colour, fontsize=7, va="center")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xlim(8, 72)
    ax.set_xlabel(r"$\log_2 L$")
    ax.set_ylabel(r"$\log k^\star / \log L$")
    ax.set_yscale("log", base=2)
    ax.set_ylim(0.12, 5)
    ax.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    keys = [
        Line2D([], [], color="black", label="uniform, by the law"),
        Line2D([], [], **COUNTED, label="worst case, by the bound"),
    ]
    ax.legend(handles=keys, loc="lower right", handlelength=1.6, labelspacing=0.1)


def _keys(fig: Figure, families: set[str]) -> None:
    keys = [
        Line2D(
            [], [], color=colour, linestyle=dash, linewidth=1.4, label=f"$k^\\star = L$, {label}"
        )
        for family, (label, colour, dash) in FAMILIES.items()
        if family in families
    ]
    keys.append(Line2D([], [], **COUNTED, label="$k^\\star = L$, by the bound"))
    even: dict[str, Any] = EVEN | {"color": "#999999"}
    keys.append(Line2D([], [], **even, label="time breaks even (white)"))
    fig.legend(handles=keys, loc="outside upper center", ncols=3, columnspacing=1.2)
