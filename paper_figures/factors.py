"""Factors of f on real heads: error and speed over L, error by width beside the SVD, error over time,
width each head needs; and what reaches a decoder's heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "factors"
LABELS = {
    "svd": "SVD (limit)",
    "tree": "block tree",
    "sparse": "sparse + low rank",
    "skeleton": "skeleton",
    "monomials": "adapted monomials",
    "random": "random features",
    "nystrom": "Nyström",
    "sinks": "first and last tokens",
}
COLOURS = {
    "svd": "#000000",
    "tree": "#D55E00",
    "sparse": "#0072B2",
    "skeleton": "#56B4E9",
    "monomials": "#009E73",
    "random": "#CC79A7",
    "nystrom": "#E69F00",
    "sinks": "#8C564B",
}
TOLERANCE = 0.1
USELESS = 30.0  # errors beyond it are drawn there
HEIGHTS = (2e-3, 40)
KINDS = ("tame", "middling", "wild")


def _kinds(rows: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """(layer, head) -> which third it is in by centred score range."""
    ranges = {(r["point"]["layer"], r["point"]["head"]): r["metrics"]["score_range"] for r in rows}
    ordered = sorted(ranges, key=lambda pair: ranges[pair])
    return {pair: min(3 * i // len(ordered), 2) for i, pair in enumerate(ordered)}


def drawn(error: float | None) -> float:
    """An error as it is drawn: useless is useless, NaN and None too."""
    return min(float(np.nan_to_num(np.asarray(error, float), nan=USELESS)), USELESS)


def _by_width(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Median error over heads and, as a band, its range; crosses where most heads were reported as
    failed.
    """
    if not rows:
        return style.empty(ax)
    for method in LABELS:
        own = [r["metrics"]["widths"] for r in rows if r["point"]["method"] == method]
        if not own:
            continue
        widths = [w["width"] for w in own[0]]
        errors = np.array([[w["error"] for w in head] for head in own], float)
        errors = np.vectorize(drawn)(errors)
        # None where a method says nothing of itself.
        failed = np.array([[bool(w["failed"]) for w in head] for head in own]).mean(0) > 0.5
        median = np.median(errors, 0)
        ax.plot(widths, median, color=COLOURS[method], linestyle="--" if method == "svd" else "-")
        ax.plot(np.array(widths)[~failed], median[~failed], "o", color=COLOURS[method])
        ax.plot(np.array(widths)[failed], median[failed], "x", color=COLOURS[method])
        if method in ("tree", "sparse", "svd", "sinks"):
            ax.fill_between(
                widths, errors.min(0), errors.max(0), color=COLOURS[method], alpha=0.12, linewidth=0
            )
    ax.axhline(TOLERANCE, color="black", linewidth=0.5, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(*HEIGHTS)
    ax.set_xlabel("width $k$")


def _by_length(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Median error of the widest of each method over all heads, by L; bands: its middle 80 %."""
    if not rows:
        return style.empty(ax)
    lengths = sorted({r["point"]["length"] for r in rows})
    for method in LABELS:
        own: dict[int, list[float]] = {}
        for r in rows:
            if r["point"]["method"] == method:
                error = r["metrics"]["widths"][-1]["error"]
                own.setdefault(r["point"]["length"], []).append(drawn(error))
        if not own:
            continue
        x = sorted(own)
        low, middle, high = (np.array([np.quantile(own[n], q) for n in x]) for q in (0.1, 0.5, 0.9))
        line = "--o" if method == "svd" else "-o"
        ax.plot(x, middle, line, color=COLOURS[method])
        if method in ("tree", "sparse", "sinks"):
            ax.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    ax.axhline(TOLERANCE, color="black", linewidth=0.5, linestyle=":")
    ax.set_yscale("log")
    ax.set_ylim(*HEIGHTS)
    style.powers_of_two(ax, lengths)
    ax.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
    ax.set_xlabel("tokens $L$")
    ax.set_ylabel("relative error")


def _kind(row: dict[str, Any], kinds: dict[tuple[int, int], int]) -> int:
    return kinds[row["point"]["layer"], row["point"]["head"]]


def _against_time(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Error over time, both at the longest sequence timed."""
    if not rows:
        return style.empty(ax)
    m = rows[-1]["metrics"]
    exact = m["contenders"][m["best"]]["seconds"]
    seen = [exact]
    for name, found in m["contenders"].items():
        method, _, width = name.partition(" ")
        if method == "exact":
            continue
        at = found["seconds"], drawn(found["error"])
        ax.plot(*at, "o", color=COLOURS[method])
        ax.annotate(width, at, (3, 3), textcoords="offset points", fontsize=6)
        seen.append(found["seconds"])
    ax.axvline(exact, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(min(seen) / 1.6, max(seen) * 1.8)
    ax.set_ylim(*HEIGHTS)
    style.round_ticks(ax.xaxis)
    ax.text(exact, 0.02, " exact", transform=ax.get_xaxis_transform(), fontsize=6)
    ax.set_xlabel("seconds")


def _speed(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """How many times as fast as the best exact gradient, over L."""
    if not rows:
        return style.empty(ax)
    lengths = [r["point"]["length"] for r in rows]
    names = [n for n in rows[0]["metrics"]["contenders"] if not n.startswith("exact")]
    for i, name in enumerate(names):
        method, _, width = name.partition(" ")
        each = [r["metrics"]["contenders"] for r in rows]
        ratio = [
            found[r["metrics"]["best"]]["seconds"] / found[name]["seconds"]
            for found, r in zip(each, rows, strict=True)
        ]
        ax.plot(lengths, ratio, "-o" if i % 2 else "--o", color=COLOURS[method])
        place = (4, 2 if i % 2 == 0 else -7)
        ax.annotate(width, (lengths[-1], ratio[-1]), place, textcoords="offset points", fontsize=6)
    ax.axhline(1, color="black", linewidth=0.5)
    ax.set_yscale("log")
    style.round_ticks(ax.yaxis)
    style.powers_of_two(ax, lengths)
    ax.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.6)
    ax.set_xlabel("tokens $L$")


def _map(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """The smallest width at which a method is within 10 %, head by head."""
    if not rows:
        return style.empty(ax)
    layers = sorted({r["point"]["layer"] for r in rows})
    largest = max(len([r for r in rows if r["point"]["layer"] == layer]) for layer in layers)
    table = np.full((len(layers), largest), np.nan)
    texts = {}
    for i, layer in enumerate(layers):
        own = sorted(
            (r for r in rows if r["point"]["layer"] == layer),
            key=lambda r: r["metrics"]["score_range"],
        )
        for j, row in enumerate(own):
            widths = [w["width"] for w in row["metrics"]["widths"] if w["error"] <= TOLERANCE]
            table[i, j] = np.log2(widths[0]) if widths else np.nan
            most = row["metrics"]["widths"][-1]["width"]
            texts[i, j] = str(widths[0]) if widths else f">{most}"
    ax.set_facecolor(style.GREY)
    look: dict[str, Any] = {"cmap": "cividis_r", "edgecolor": "white", "linewidth": 0.8}
    ax.pcolormesh(np.ma.masked_invalid(table), vmin=3, vmax=9, **look)
    for (i, j), text in texts.items():
        dark = np.isfinite(table[i, j]) and table[i, j] > 6
        colour = "white" if dark else "black"
        where: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 5.5}
        ax.text(j + 0.5, i + 0.5, text, color=colour, **where)
    ax.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    ax.set_xticks([])
    ax.invert_yaxis()
    ax.set_ylabel("layer")
    ax.set_xlabel("heads, tame to wild")


def _longest(errors: list[dict[str, Any]]) -> int:
    """The longest length of sparse plus low rank that has its limit, the SVD, beside it; its
    longest where none has.
    """
    lengths = {
        method: {r["point"]["length"] for r in errors if r["point"]["method"] == method}
        for method in ("sparse", "svd")
    }
    every = {r["point"]["length"] for r in errors}
    return max((lengths["sparse"] & lengths["svd"]) or lengths["sparse"] or every, default=0)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) error and (b) speed over L; (c-e) error by width on each third of the heads; (f) error over
    time; (g) width needed. Of a decoder's heads: (h) error over L, (i) by width, (j) over time.
    """
    kinds = {row["point"]["kind"] for row in rows}
    decoder = bool(kinds & {"decoder", "decoder time"})
    fig, axes = style.figure(8.0 if decoder else 6.0)
    axes[0, 0].remove()
    grid = fig.add_gridspec(4 if decoder else 3, 1)
    methods = _encoder(fig, grid, rows)
    if decoder:
        methods |= _decoder([fig.add_subplot(p) for p in grid[3].subgridspec(1, 3)], rows)
    _legend(fig, methods)
    return fig


def _of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows of a kind, the shortest first."""
    own = [r for r in rows if r["point"]["kind"] == kind]
    return sorted(own, key=lambda r: r["point"]["length"])


def _encoder(fig: Figure, grid: Any, rows: list[dict[str, Any]]) -> set[str]:
    """Panels (a) to (g); returns the methods that there are rows of."""
    top = [fig.add_subplot(part) for part in grid[0].subgridspec(1, 2)]
    middle = [fig.add_subplot(part) for part in grid[1].subgridspec(1, 3)]
    bottom = [fig.add_subplot(part) for part in grid[2].subgridspec(1, 2, width_ratios=(1, 2))]
    errors = [r for r in rows if r["point"]["kind"] == "error"]
    times = _of_kind(rows, "time")
    widest = max((w["width"] for r in errors for w in r["metrics"]["widths"]), default=0)
    _by_length(top[0], errors)
    style.panel(top[0], "a", f"all heads, $k = {widest}$")
    _speed(top[1], times)
    style.panel(top[1], "b", "times as fast as exact")
    at = _longest(errors)
    shown = [r for r in errors if r["point"]["length"] == at]
    kinds = _kinds(errors)
    for i, kind in enumerate(KINDS):
        _by_width(middle[i], [r for r in shown if _kind(r, kinds) == i])
        style.panel(middle[i], "cde"[i], f"{kind} heads, $L = {at}$")
    middle[0].set_ylabel("relative error")
    _against_time(bottom[0], times)
    longest = max((r["point"]["length"] for r in times), default=0)
    style.panel(bottom[0], "f", f"error, $L = {longest}$")
    methods = {r["point"]["method"] for r in errors}
    best = "tree" if "tree" in methods else "sparse"
    _map(bottom[1], [r for r in shown if r["point"]["method"] == best])
    style.panel(bottom[1], "g", f"width of {LABELS[best]} for 10 %, $L = {at}$")
    return methods


def _decoder(axes: list[Axes], rows: list[dict[str, Any]]) -> set[str]:
    """Panels (h) to (j); returns the methods that there are rows of."""
    errors = _of_kind(rows, "decoder")
    times = _of_kind(rows, "decoder time")
    longest = max((r["point"]["length"] for r in errors), default=0)
    widest = max((w["width"] for r in errors for w in r["metrics"]["widths"]), default=0)
    _by_length(axes[0], errors)
    style.panel(axes[0], "h", f"decoder, $k = {widest}$")
    _by_width(axes[1], [r for r in errors if r["point"]["length"] == longest])
    style.panel(axes[1], "i", f"decoder, $L = {longest}$")
    _against_time(axes[2], times)
    timed = max((r["point"]["length"] for r in times), default=0)
    style.panel(axes[2], "j", f"decoder, $L = {timed}$")
    return {r["point"]["method"] for r in errors}


def _legend(fig: Figure, methods: set[str]) -> None:
    """The methods that there are, and the cross."""
    handles = [
        Line2D(
            [],
            [],
            linestyle="--" if m == "svd" else "-",
            marker=None if m == "svd" else "o",
            color=COLOURS[m],
            label=LABELS[m],
        )
        for m in LABELS
        if m in methods
    ]
    cross = Line2D([], [], linestyle="none", marker="x", color="black", label="reported as failed")
    fig.legend(handles=[*handles, cross], loc="outside lower center", ncols=4)
