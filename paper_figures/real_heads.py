"""Real heads of an encoder and a decoder on the theorems' map, and what each degree reaches on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style

CONFIG = "real_heads"
COLOURS = {"encoder": style.COLOURS[0], "decoder": style.COLOURS[1]}
NAMES = {"encoder": "MiniLM", "decoder": "SmolLM2"}
MARKS = "os^D"  # of the decoder's lengths, shortest first
STEPS = ("without_rotation_and_mask", "without_mask", "f")
USELESS = 1e3  # errors beyond it are drawn there


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) heads on the map; (b) what centring gains; (c) what rotation costs; (d) error by degree,
    the median head (dashed: the decoder at its shorter length) and the range of all; (e) features
    needed at each tolerance; (f) the rank of f without and with rotation and mask.
    """
    fig, axes = style.figure(4.3, 2, 3)
    heads = [_Head(row) for row in rows]
    panels = (
        (_map, "on the map"),
        (_centring, "centring"),
        (_rotation, "rotation"),
        (_errors, "relative error"),
        (_features, r"features $k^\star$ needed"),
        (_ranks, f"rank of $f$, {_finest(heads):.0%}".replace("%", " %")),
    )
    for letter, ax, (panel, title) in zip("abcdef", axes.flat, panels, strict=True):
        panel(ax, heads)
        style.panel(ax, letter, title)
    fig.legend(
        handles=_legend(heads),
        loc="outside lower center",
        ncols=4,
        handletextpad=0.2,
        columnspacing=1,
    )
    return fig


class _Head:
    """A row: its point and metrics, and how it is drawn."""

    def __init__(self, row: dict[str, Any]):
        # Rows of the first version are of the encoder alone, at 512 tokens.
        self.model: str = row["point"].get("model", "encoder")
        self.length: int = row["point"].get("length", 512)
        self.layer: int = row["point"]["layer"]
        self.metrics: dict[str, Any] = row["metrics"]
        self.colour = COLOURS[self.model]


def _lengths(heads: list[_Head]) -> list[int]:
    return sorted({h.length for h in heads if h.model == "decoder"})


def _dense(heads: list[_Head]) -> list[_Head]:
    """Those of whom more than norms was measured."""
    return [h for h in heads if "errors" in h.metrics]


def _finest(heads: list[_Head]) -> float:
    """The last of the tolerances, which ranks are drawn for."""
    return next((float(list(h.metrics["needed"])[-1]) for h in _dense(heads)), math.nan)


def _mark(head: _Head, heads: list[_Head]) -> dict[str, Any]:
    """The encoder's circles are full; the decoder's marks say the length."""
    if head.model == "encoder":
        return {"marker": "o", "color": head.colour, "linestyle": "none"}
    place = _lengths(heads).index(head.length) + 1
    return {"marker": MARKS[place], "color": head.colour, "linestyle": "none", "fillstyle": "none"}


def _legend(heads: list[_Head]) -> list[Line2D]:
    """One entry for each model and length, and for the two tolerances."""
    first = {(h.model, h.length): h for h in heads}
    return [
        Line2D([], [], label=f"{NAMES[model]}, $L = {length}$", **_mark(head, heads))
        for (model, length), head in sorted(
            first.items(), key=lambda x: (x[0][0] == "decoder", x[0])
        )
    ]


def _map(ax: Axes, heads: list[_Head]) -> None:
    """R / ln L of each head against Gamma / sqrt(ln L); lines where the theorems' bounds are."""
    for h in heads:
        ax.plot(h.metrics["gamma_ratio"], h.metrics["score_ratio"], **_mark(h, heads))
    _log_log(ax)
    for line in (ax.axvline, ax.axhline):
        line(1, color="black", linewidth=0.6, linestyle="--")
    ax.set_xlabel(r"$\Gamma / \sqrt{\ln L}$")
    ax.set_ylabel(r"$R / \ln L$, centred")


def _centring(ax: Axes, heads: list[_Head]) -> None:
    """Standard deviation of the scores of each head, centred against raw."""
    for h in _dense(heads):
        ax.plot(h.metrics["score_std"], h.metrics["score_std_centred"], **_mark(h, heads))
    _diagonal(ax)
    ax.set_xlabel("std of scores, raw")
    ax.set_ylabel("std of scores, centred")


def _rotation(ax: Axes, heads: list[_Head]) -> None:
    """R / ln L, centred, after rotation against before."""
    turned = [h for h in heads if "before" in h.metrics]
    if not turned:
        return style.empty(ax)
    for h in turned:
        before = h.metrics["before"]["score_ratio"]
        ax.plot(before, h.metrics["score_ratio"], **_mark(h, heads))
    _diagonal(ax)
    ax.set_xlabel(r"$R / \ln L$ before")
    ax.set_ylabel(r"$R / \ln L$ after")


def _errors(ax: Axes, heads: list[_Head]) -> None:
    """Relative error by degree: the median head of each model and length, and the range of all."""
    dense = _dense(heads)
    for model, length in dict.fromkeys((h.model, h.length) for h in dense):
        own = [h for h in dense if (h.model, h.length) == (model, length)]
        errors = np.array([h.metrics["errors"] for h in own], float)
        errors = np.minimum(np.where(np.isfinite(errors), errors, np.inf), USELESS)
        degrees = np.arange(1, errors.shape[1] + 1)
        dashed = model == "decoder" and length != _lengths(dense)[-1]
        ax.plot(degrees, np.median(errors, 0), "--" if dashed else "-", color=COLOURS[model])
        if not dashed:
            band = {"color": COLOURS[model], "alpha": 0.15, "linewidth": 0}
            ax.fill_between(degrees, errors.min(0), errors.max(0), **band)
    ax.set_yscale("log")
    ax.set_ylim(1e-6, USELESS)
    ax.axhline(0.1, color="black", linewidth=0.6, linestyle="--")
    ax.axhline(0.01, color="black", linewidth=0.6, linestyle=":")
    ax.set_xlabel("degree $g$")


def _features(ax: Axes, heads: list[_Head]) -> None:
    """Features that each head needs for 10 %, by its centred score range; at the top: no degree."""
    dense = _dense(heads)
    found = [next(iter(h.metrics["needed"].values()))["features"] for h in dense]
    logs = [math.log10(k) if k else math.nan for k in found]
    top = math.ceil(np.nanmax([*logs, 4.0])) + 1
    for h, log in zip(dense, logs, strict=True):
        y = top if math.isnan(log) else log
        ax.plot(h.metrics["score_max_centred"], y, **_mark(h, heads))
    ax.axhline(top - 0.5, color="black", linewidth=0.6, linestyle=":")
    ax.set_xscale("log")
    style.round_ticks(ax.xaxis)
    ax.set_xlabel("centred score range $R$")
    marks = list(range(math.floor(np.nanmin([*logs, 4.0])), top - 1, max(1, (top - 4) // 5)))
    ax.set_yticks([*marks, top], [*(f"$10^{{{m}}}$" for m in marks), "none"])
    lost = sum(k is None for k in found)
    if lost:
        most = max(len(h.metrics["errors"]) for h in dense)
        said = f"none: {lost} of {len(dense)} need\nmore than degree {most}"
        ax.text(0.98, 0.04, said, transform=ax.transAxes, fontsize=6, ha="right")


def _ranks(ax: Axes, heads: list[_Head]) -> None:
    """Ranks within the last tolerance over L: of f as it is, without the mask, without rotation."""
    measured = [h for h in heads if "ranks" in h.metrics]
    if not measured:
        return style.empty(ax)
    places = {"encoder": {"f": 0.0}, "decoder": dict(zip(STEPS, (1.0, 2.0, 3.0), strict=True))}
    longest = {m: max((h.length for h in measured if h.model == m), default=0) for m in places}
    for h in measured:
        if h.length != longest[h.model]:
            continue
        x = places[h.model]
        y = [list(h.metrics["ranks"][step].values())[-1] / h.length for step in x]
        ax.plot(list(x.values()), y, color=h.colour, linewidth=0.5, alpha=0.6)
        ax.plot(list(x.values()), y, **_mark(h, heads))
    ax.set_yscale("log")
    style.round_ticks(ax.yaxis)
    ax.set_xlim(-0.5, 3.5)
    names = ["encoder", "bare", "rotated", "rotated,\ncausal"]
    ax.set_xticks(range(4), names, fontsize=6)
    ax.set_ylabel("rank over $L$")


def _log_log(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    style.round_ticks(ax.xaxis)
    style.round_ticks(ax.yaxis)


def _diagonal(ax: Axes) -> None:
    """Log axes of one scale, and the line on which nothing changes."""
    _log_log(ax)
    ends = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot(ends, ends, color="black", linewidth=0.6)
    ax.set_xlim(*ends)
    ax.set_ylim(*ends)
