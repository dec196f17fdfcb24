"""The two maps of a diagnosis, layers down and heads across: verdicts, and score bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_limits.diagnose.advice import basis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Verdicts: label, colour, the longest length of the class.
CLASSES = (
    ("now", "#00477A", 0),
    ("up to 4k", "#0072B2", 4096),
    ("4k to 16k", "#56A3CF", 16384),
    ("16k to 64k", "#A9CFE6", 65536),
    ("beyond 64k", "#D9E8F2", np.inf),
)
NEVER, REFUSED = "#E9C46A", "#FFFFFF"
PALE = "#F3F3F3"  # a head that was not looked at
# What fills the square of a refused head, white beside the coloured ones, and of one whose length
# is extrapolated.
CROSSED: dict[str, Any] = {"hatch": "xxxx", "edgecolor": "#BBBBBB"}
HATCHED: dict[str, Any] = {"hatch": "////", "edgecolor": "#FFFFFF"}
MOST_WORDS = 16  # heads across, with which there is room for a word in each square
THEORY = (
    "$R$ bounds the scores, centred. Polynomials take almost\n"
    "linear time while it stays far below $\\ln L$."
)


def verdicts(ax: Axes, rows: list[dict[str, Any]], tolerance: float) -> None:
    """Draws from how many tokens on a method is faster than the exact gradient, head by head."""
    from matplotlib.patches import Patch

    colours = [_colour(row) for row in rows]
    texts = ["" if row.get("verdict") != "later" else _short(row["pays_from"]) for row in rows]
    beyond = [basis(row) == "extrapolated" for row in rows]
    _cells(ax, rows, colours, texts, beyond)
    _titles(ax, "From how many tokens on would they pay?", "faster from there than exact ones")
    shown = [(label, colour) for label, colour, _ in CLASSES if colour in colours]
    shown += [(f"never at {tolerance:.0%}", NEVER)] * (NEVER in colours)
    handles = [Patch(facecolor=colour, label=label) for label, colour in shown]
    if any(beyond):
        handles.append(Patch(facecolor="#56A3CF", linewidth=0, label="extrapolated", **HATCHED))
    if REFUSED in colours:
        handles.append(Patch(facecolor=REFUSED, linewidth=0, label="not analysed", **CROSSED))
    place = {
        "loc": "lower left",
        "bbox_to_anchor": (-0.01, 0.985),
        "borderaxespad": 0.2,
        "frameon": False,
    }
    ax.legend(
        handles=handles,
        ncols=3,
        fontsize=6.5,
        handlelength=0.9,
        columnspacing=0.9,
        handletextpad=0.4,
        **place,
    )


def scores(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Draws R / ln L of every head of which it is known, darker where it is larger."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = [_score_ratio(row) for row in rows]
    # The scale holds 0.5 to 2 whatever the heads: a tame model does not look wild.
    held = [0.5, 2.0, *(v for v in values if v is not None)]
    norm = LogNorm(min(held), max(held))
    colours = colormaps["YlOrBr"]
    texts = ["" if v is None else f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in values]
    _cells(ax, rows, [REFUSED if v is None else colours(0.85 * norm(v)) for v in values], texts)
    _titles(ax, r"How large are the scores? $R\,/\ln L$", THEORY, linespacing=1.3)
    ax.set_ylabel("")


def _score_ratio(row: dict[str, Any]) -> float | None:
    """R / ln L of a head, kept off 0 for a logarithmic scale; None where it has no norms."""
    return max(row["norms"]["adapted"]["score_ratio"], 1e-3) if row.get("norms") else None


def _colour(row: dict[str, Any]) -> str:
    """The colour of a head's verdict."""
    if row["refused"]:
        return REFUSED
    if row["verdict"] == "never":
        return NEVER
    if row["verdict"] == "now":
        return CLASSES[0][1]
    return next(colour for _, colour, most in CLASSES[1:] if row["pays_from"] <= most)


def _short(length: float) -> str:
    """A length in few characters: 640, 12k, 3M."""
    if length < 1000:
        return f"{length:.0f}"
    return f"{length / 1000:.0f}k" if length < 1e6 else f"{length / 1e6:.0f}M"


def _ink(colour: Any) -> str:
    """White on dark colours, by a rough luminance, black on light ones."""
    from matplotlib.colors import to_rgb

    return "white" if np.dot(to_rgb(colour), (0.3, 0.6, 0.1)) < 0.55 else "black"


def _titles(ax: Axes, title: str, under: str, **options: Any) -> None:
    """A map's question, and in small what its colours mean."""
    ax.set_title(title, fontsize=8.5, loc="left", pad=31, x=-0.01)
    ax.text(-0.01, 1.215, under, fontsize=6.5, transform=ax.transAxes, va="top", **options)


def _cells(
    ax: Axes,
    rows: list[dict[str, Any]],
    colours: list[Any],
    texts: list[str],
    hatched: list[bool] | None = None,
) -> None:
    """One square a head, layers downwards, with a word in each where there is room.

    Heads that were not looked at are pale.
    """
    from matplotlib.patches import Rectangle

    layers = max(r["layer"] for r in rows) + 1
    heads = max(r["head"] for r in rows) + 1
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 5.5}
    marks = hatched or [False] * len(rows)
    looked = {(row["head"], row["layer"]) for row in rows}
    for x, y in sorted({(h, n) for h in range(heads) for n in range(layers)} - looked):
        ax.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=PALE, linewidth=0))
    for row, colour, text, mark in zip(rows, colours, texts, marks, strict=True):
        x, y = row["head"], row["layer"]
        fill = CROSSED if colour == REFUSED else HATCHED if mark else {}
        square = Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, linewidth=0, **fill)
        ax.add_patch(square)
        if heads <= MOST_WORDS and layers <= MOST_WORDS:
            ground = {"facecolor": colour, "linewidth": 0, "pad": 0.6} if mark and text else None
            ax.text(x, y, text, color=_ink(colour), bbox=ground, **words)
    ax.set(xlim=(-0.6, heads - 0.4), ylim=(layers - 0.4, -0.6))
    ax.set_xticks(range(0, heads, max(1, heads // 12)))
    ax.set_yticks(range(0, layers, max(1, layers // 12)))
    ax.tick_params(length=0, labelsize=6.5, pad=1.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("head", labelpad=2)
    ax.set_ylabel("layer", labelpad=2)
