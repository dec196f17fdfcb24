"""The error of an approximate gradient against the noise of its batch, and what the final metric
loses by either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.drawing.statistics import interval
from paper_figures.numbers.batch_and_rank import (
    NORMS,
    crossing,
    degrees,
    followed,
    grouped,
    moments,
    reference,
    regression,
    rule,
    table,
    typical,
)

__all__ = ["NORMS", "draw", "followed", "interval", "regression", "rule", "table"]

CONFIG = "batch_and_rank"
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, _ = style.COLOURS
FARTHEST = 100  # error over noise, where a run without a number is marked
LEAST, MOST = 1, 1e7  # batch sizes past them are drawn at the edge
LOOKS = {"normalised": (BLUE, "o"), "shrunk": (GREEN, "s"), "free": (RED, "^")}


def colour_of(degree: int, every: Sequence[int]) -> str:
    return (RED, ORANGE, GREEN, SKY, BLUE, PINK)[every.index(degree) % 6]


def _against_noise(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Relative noise and errors over b after training, root mean squares over the seeds."""
    usual = reference(rows)
    seen = moments(rows, "after", norms=usual["norms"], rank=usual["rank"], rate=usual["rate"])
    if not seen:
        return style.empty(ax)
    mean = {
        n: {k: float(np.mean([m[n][k] for m in seen])) for k in ("mean", "spread")} for n in seen[0]
    }
    b = np.geomspace(1, 4096, 60)
    # Both are drawn relative to the gradient's own size.
    size = max(mean["exact"]["mean"], 1e-12)
    noise = np.sqrt(mean["exact"]["spread"] / b / size)
    ax.plot(b, noise, color=BLACK)
    ax.text(3, noise[0] * 0.8, "noise of a batch", fontsize=7, va="center")
    every = degrees(rows)
    for degree in every:
        own = mean[f"polynomial {degree}"]
        error = np.sqrt((max(own["mean"], 0) + own["spread"] / b) / size)
        colour = colour_of(degree, every)
        ax.plot(b, error, color=colour)
        star = crossing(mean["exact"], own)
        if 1 < star < b[-1]:
            ax.plot(
                star, np.sqrt(mean["exact"]["spread"] / star / size), "o", color=colour, zorder=3
            )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("batch $b$")


def _crossings(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """b* by degree for each way to hold the norms, before (hollow) and after training; bars: all
    seeds.
    """
    usual = reference(rows)
    every = degrees(rows)
    if not every or not moments(rows, "after", rank=usual["rank"], rate=usual["rate"]):
        return style.empty(ax)
    for n, (norms, (colour, marker)) in enumerate(LOOKS.items()):
        for stage, fill in (("before", "none"), ("after", "full")):
            seen = moments(rows, stage, norms=norms, rank=usual["rank"], rate=usual["rate"])
            if not seen:
                continue
            stars = [[crossing(m["exact"], m[f"polynomial {g}"]) for m in seen] for g in every]
            stars = np.clip(stars, LEAST, MOST)
            # A geometric mean, for batches at which they meet differ by factors.
            middle = np.exp(np.log(stars).mean(1))
            # Side by side, so that their bars do not cover one another.
            x = np.arange(len(every)) + 0.12 * (n - 1)
            dash = "-" if stage == "after" else ":"
            look: dict[str, Any] = {"color": colour, "marker": marker, "fillstyle": fill}
            look["linestyle"] = dash
            bars = np.maximum([middle - stars.min(1), stars.max(1) - middle], 0)
            ax.errorbar(x, middle, bars, linewidth=0.8, elinewidth=0.6, **look)
    ax.set_yscale("log")
    # No tick in the room that is made for the legend.
    high = ax.get_ylim()[1]
    style.headroom(ax, 0.45)
    ticks = [t for t in (1, 1e2, 1e4, 1e6) if t < high]
    ax.set_yticks(ticks, [r"$\leq 1$" if t == 1 else f"$10^{{{np.log10(t):.0f}}}$" for t in ticks])
    ax.minorticks_off()
    ax.set_xticks(range(len(every)), [str(g) for g in every])
    ax.set_xlabel("degree $g$")
    present = {row["point"]["norms"] for row in rows}
    marks = [
        Line2D([], [], color=c, marker=m, label=n) for n, (c, m) in LOOKS.items() if n in present
    ]
    marks.append(
        Line2D([], [], color=BLACK, marker="o", fillstyle="none", linestyle=":", label="before")
    )
    marks.append(Line2D([], [], color=BLACK, marker="o", label="after training"))
    look = {"handlelength": 1.6, "columnspacing": 0.8, "labelspacing": 0.2, "borderaxespad": 0.1}
    ax.legend(handles=marks, loc="upper left", ncols=2, **look)


def _rule(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Loss less that of exact training against error over noise, a point a kind of run, coloured by
    its norms, with the regression within them. At the top: runs that end in no number.
    """
    if not grouped(rows):
        return style.empty(ax)
    top = ax.get_xaxis_transform()
    for group in grouped(rows):
        norms = group[0]["point"]["norms"]
        colour, marker = LOOKS[norms]
        look: dict[str, Any] = {"color": colour, "markersize": 2.5, "linestyle": "none"}
        x = typical(group)
        if not all(pair["finite"] for pair in group):
            # Where the error itself is no number, it is far above the noise.
            ax.plot(
                min(x if x > 0 else FARTHEST, FARTHEST), 0.97, marker="x", transform=top, **look
            )
            continue
        mean, half = interval(pair["loss"][0] for pair in group)
        ax.errorbar(x, mean, half, elinewidth=0.5, marker=marker, **look)
    for norms, (colour, _) in LOOKS.items():
        ratios = [typical(g) for g in grouped(rows) if g[0]["point"]["norms"] == norms]
        ratios = [x for x in ratios if np.isfinite(x)]
        if line := regression(rows, norms):
            ends = np.geomspace(min(ratios), max(ratios))
            ax.plot(ends, line[2] + line[0] * np.log10(ends), color=colour, linewidth=0.8)
    ax.axhline(0, color=BLACK, linewidth=0.6)
    ax.axvline(1, color=BLACK, linewidth=0.6, linestyle="--")
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_yticks([-0.1, 0, 0.1, 1], ["$-0.1$", "0", "0.1", "1"])
    ax.set_xlabel("error / noise")


def _followed(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Held-out loss under exact attention less that of exact training of the same seed along long
    runs: mean and 95 % band; dashed: not normalised.
    """
    found = followed(rows)
    if not found:
        return style.empty(ax)
    every = degrees(rows)
    for (norms, method), own in found.items():
        if not np.isfinite(own["served"]).all():
            continue
        mean, half = np.array([interval(each) for each in own["served"].T]).T
        colour = colour_of(int(method.split()[1]), every)
        dash = "-" if norms == "normalised" else "--"
        ax.plot(own["steps"], mean, dash, color=colour, linewidth=0.9)
        look: dict[str, Any] = {"color": colour, "alpha": 0.08, "linewidth": 0}
        ax.fill_between(own["steps"], mean - half, mean + half, **look)
    ax.axhline(0, color=BLACK, linewidth=0.6)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_yticks([-0.1, 0, 0.1, 1], ["$-0.1$", "0", "0.1", "1"])
    ax.set_xlabel("step")


def _metric(ax: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """Points of accuracy over exact training along one of norms, rank and batch; ticks: what exact
    reaches.
    """
    fixed = {n: x for n, x in reference(rows).items() if n != name}
    groups = [g for g in grouped(rows) if all(g[0]["point"][n] == x for n, x in fixed.items())]
    if not groups:
        return style.empty(ax)
    found = dict.fromkeys(group[0]["point"][name] for group in groups)
    values = [n for n in NORMS if n in found] if name == "norms" else sorted(found)
    every = degrees(rows)
    for group in groups:
        point = group[0]["point"]
        degree = int(group[0]["point"]["method"].split()[1])
        x = values.index(point[name]) + 0.15 * (every.index(degree) - (len(every) - 1) / 2)
        mean, half = interval(100 * pair["accuracy"][0] for pair in group)
        ax.errorbar(
            x,
            mean,
            half,
            color=colour_of(degree, every),
            marker="o",
            markersize=2.5,
            elinewidth=0.7,
        )
    ax.axhline(0, color=BLACK, linewidth=0.6)
    ticks = [f"{v}\n({_exact_accuracy(rows, fixed | {name: v}):.0f} %)" for v in values]
    ax.set_xticks(range(len(values)), ticks)
    ax.set_xlabel({"norms": "queries and keys", "rank": "rank $r$", "batch": "batch $b$"}[name])


def _exact_accuracy(rows: list[dict[str, Any]], where: dict[str, Any]) -> float:
    """What exact training reaches, in percent, the mean over seeds."""
    wanted = where | {"kind": "run", "method": "exact"}
    mine = [row for row in rows if all(row["point"].get(n) == x for n, x in wanted.items())]
    return float(np.mean([100 * row["metrics"]["own"]["accuracy"] for row in mine]))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) noise and error, (b) b*, (c) loss over exact's against error over noise, with the
    regression within each kind of norms, (d) the same, under exact attention, along runs of several
    hundred steps (dashed: shrunk), (e), (f) points of accuracy over exact's; 95 % bars and bands.
    """
    fig, axes = style.figure(4.1, 2, 3)
    for ax, letter, title, part in (
        (axes[0, 0], "a", "noise and error", _against_noise),
        (axes[0, 1], "b", r"where they meet, $b^\star$", _crossings),
        (axes[0, 2], "c", "loss over exact's", _rule),
        (axes[1, 0], "d", "loss along training", _followed),
    ):
        part(ax, rows)
        style.panel(ax, letter, title)
    titles = {"rank": "by rank", "norms": "by norms"}
    for ax, letter, (name, title) in zip(axes[1, 1:], "ef", titles.items(), strict=True):
        _metric(ax, rows, name)
        style.panel(ax, letter, title)
    axes[0, 0].set_ylabel("over the gradient's norm")
    axes[1, 1].set_ylabel("points of accuracy")
    every = degrees(rows)
    look: dict[str, Any] = {"marker": "o", "markersize": 2.5}
    lines = [Line2D([], [], color=colour_of(g, every), label=f"degree {g}", **look) for g in every]
    if lines:
        fig.legend(handles=lines, loc="outside lower center", ncols=len(lines), columnspacing=1.2)
    return fig
