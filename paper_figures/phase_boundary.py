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
from matplotlib.patches import Patch

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
# exact, degrees, then factors
PICKS = {
    "exact": "#BBBBBB",
    "1": "#FDE725",
    "2": "#9BD93C",
    "3": "#4AC16D",
    "4": "#1F9A8A",
    "5": "#365C8D",
    "6+": "#46327E",
    "skeleton": "#E07B39",
    "sparse": "#B5446E",
    "tree": "#7A3B69",
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a-d) colour: log k* / log L of uniform inputs, by width and tolerance; lines: where k* = L,
    by family, with the band of the seeds (the gadget is the worst case for polynomials); white:
    where time breaks even with the best exact gradient; dashed: k* = L by the bound alone, counted.
    (e, f) the fastest gradient that meets the tolerance, uniform inputs, d = log2 L: exact, a
    polynomial by its degree, or a factor (skeleton, sparse plus low rank, block tree) where one is
    faster at that error. Grey: not measured, or beyond what was. (g) the law k* = binom(d + g,
    g), g the degree of Taylor's remainder at rho = c R, one c a family: predicted against measured;
    inset: k* / L over the rank of the adapters. (h) tolerance 1/L beyond what runs: the law for
    uniform inputs, the bound for the worst case; stars: gradients streamed from a file, d = 8.
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
        factors = boundary.select(points, kind="factor")
        _picks(axes[2, j], growing, times, factors, tolerance)
        style.panel(axes[2, j], "ef"[j], f"which to pick, error {boundary.TOLERANCES[tolerance]}")
    axes[2, 0].set_ylabel(r"$R / \ln L$")
    laws = {f: boundary.fit(boundary.select(cells, family=f)) for f in FAMILIES}
    _law(axes[3, 0], laws)
    _ranks(axes[3, 0], boundary.select(points, kind="rank"))
    _continued(axes[3, 1], [p for p in points if p["kind"] == "counted"], laws[TYPICAL])
    _streams(axes[3, 1], boundary.select(points, kind="stream"))
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
    ax.set_facecolor(style.GREY)
    image = None
    look: dict[str, Any] = {"cmap": "viridis_r", "vmin": 0, "vmax": 1.5}
    for alike in boundary.by_gammas(typical):
        x, y, z = boundary.grid(alike, tolerance)
        if min(z.shape) > 1:
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


def _picks(
    ax: Axes,
    cells: boundary.Points,
    times: boundary.Clock | None,
    factors: boundary.Points,
    tolerance: str,
) -> None:
    """Colour: the fastest of exact, every degree and the factors that meets the tolerance."""
    cells = [p for p in cells if times is not None and times.covers(p)]
    _axes(ax, cells)
    if times is None or not cells:
        return
    order = list(PICKS)
    lengths = sorted({p["length"] for p in cells})
    gammas = sorted({p["gamma"] for p in cells})
    x, y = np.meshgrid(np.log2(lengths), np.zeros(len(gammas)))
    z = np.full(x.shape, np.nan)
    for j, n in enumerate(lengths):
        for i, gamma in enumerate(gammas):
            y[i, j] = math.log2(gamma**2 / math.log(n))
            here = boundary.select(cells, length=n, gamma=gamma)
            if here:
                # of several seeds what most of them say
                names = [boundary.pick(times, factors, p, tolerance).name for p in here]
                picks = [order.index(name if name in PICKS else "6+") for name in names]
                z[i, j] = max(sorted(set(picks)), key=picks.count)
    norm = BoundaryNorm(np.arange(len(PICKS) + 1) - 0.5, len(PICKS))
    look: dict[str, Any] = {"cmap": ListedColormap(list(PICKS.values())), "norm": norm}
    ax.pcolormesh(x, y, z, shading="nearest", rasterized=True, **look)
    if ax.get_subplotspec().is_last_col():  # pyright: ignore
        # exact and polynomials always, a factor where it is picked
        shown = [n for i, n in enumerate(order) if n[0].isdigit() or n == "exact" or i in z]
        names = [f"degree {name}" if name[0].isdigit() else name for name in shown]
        keys = [Patch(color=PICKS[n], label=label) for n, label in zip(shown, names, strict=True)]
        look = {"handlelength": 1, "handleheight": 1, "labelspacing": 0.15, "borderaxespad": 0}
        ax.legend(handles=keys, loc="center left", bbox_to_anchor=(1.28, 0.5), **look)


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
    # room for the legend above the points, and for the inset beside them
    ax.set_xlim(0.1, 3.2)
    ax.set_ylim(0.1, 3.2)
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
    ax.set_ylim(0.07, 5)
    ax.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    keys = [
        Line2D([], [], color="black", label="uniform, by the law"),
        Line2D([], [], **COUNTED, label="worst case, by the bound"),
    ]
    ax.legend(handles=keys, loc="lower right", handlelength=1.6, labelspacing=0.1)


def _ranks(ax: Axes, points: boundary.Points) -> None:
    """Inset: k* / L over r, the mean of the seeds; flat, as Gamma is fixed."""
    if not points:
        return
    inside = ax.inset_axes((0.74, 0.13, 0.25, 0.26))
    ranks = sorted({p["rank"] for p in points})
    for i, tolerance in enumerate(boundary.TOLERANCES):
        cells = [boundary.select(points, rank=r) for r in ranks]
        shares = [[p[tolerance]["exponent"] or math.nan for p in here] for here in cells]
        means = [float(np.mean(here)) for here in shares]
        inside.plot(ranks, means, "o-", color=style.COLOURS[3 + i], markersize=2, linewidth=0.8)
    inside.set_xscale("log", base=2)
    inside.set_xticks([ranks[0], ranks[-1]], [str(ranks[0]), str(ranks[-1])], fontsize=5.5)
    inside.tick_params(labelsize=5.5, length=2, pad=1)
    inside.minorticks_off()
    inside.set_ylim(0, 1)
    inside.set_title("measured, over rank $r$", fontsize=5.5, pad=2)


def _streams(ax: Axes, points: boundary.Points) -> None:
    """Stars, and what the longest of them is."""
    points = sorted(points, key=lambda p: p["length"])
    for p in points:
        ax.plot(math.log2(p["length"]), p["exponent"], "*", color="black", markersize=5, zorder=4)
    for p in points[-1:]:
        x = math.log2(p["length"])
        text = f"$2^{{{x:.0f}}}$ tokens, error {p['error']:.0e}"
        ax.annotate(text, (x + 3, p["exponent"] * 0.93), fontsize=6, va="center")


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
