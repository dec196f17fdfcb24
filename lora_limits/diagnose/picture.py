"""The picture of a diagnosis: where an approximate gradient would pay, why not elsewhere, and the
three dials.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.5, 4.3  # inches
RC: dict[Any, Any] = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral"],
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.linewidth": 0.6,
    "savefig.dpi": 200,
}
# verdicts: label, colour, the longest length of the class
CLASSES = (
    ("now", "#00477A", 0),
    ("up to 4k", "#0072B2", 4096),
    ("4k to 16k", "#56A3CF", 16384),
    ("16k to 64k", "#A9CFE6", 65536),
    ("beyond 64k", "#D9E8F2", np.inf),
)
NEVER, REFUSED = "#E9C46A", "#FFFFFF"
THEORY = "$R$ bounds the scores, centred. Polynomials take almost\nlinear time while it stays far below $\\ln L$."


def _colour(row: dict[str, Any]) -> str:
    if row["refused"]:
        return REFUSED
    if row["verdict"] == "never":
        return NEVER
    if row["verdict"] == "now":
        return CLASSES[0][1]
    return next(colour for _, colour, most in CLASSES[1:] if row["pays_from"] <= most)


def _short(length: float) -> str:
    return (
        f"{length:.0f}"
        if length < 1000
        else f"{length / 1000:.0f}k"
        if length < 1e6
        else f"{length / 1e6:.0f}M"
    )


def _ink(colour: Any) -> str:
    from matplotlib.colors import to_rgb

    return "white" if np.dot(to_rgb(colour), (0.3, 0.6, 0.1)) < 0.55 else "black"


def _cells(ax: Axes, rows: list[dict[str, Any]], colours: list[Any], texts: list[str]) -> None:
    """One square a head, layers downwards, with a word in each where there is room."""
    from matplotlib.patches import Rectangle

    layers = max(r["layer"] for r in rows) + 1
    heads = max(r["head"] for r in rows) + 1
    for row, colour, text in zip(rows, colours, texts, strict=True):
        place = (row["head"] - 0.46, row["layer"] - 0.46)
        hatch: dict[str, Any] = (
            {"hatch": "////", "edgecolor": "#BBBBBB"} if colour == REFUSED else {}
        )
        ax.add_patch(Rectangle(place, 0.92, 0.92, facecolor=colour, linewidth=0, **hatch))
        if heads <= 16:
            ax.text(
                row["head"],
                row["layer"],
                text,
                ha="center",
                va="center",
                fontsize=5.5,
                color=_ink(colour),
            )
    ax.set(xlim=(-0.6, heads - 0.4), ylim=(layers - 0.4, -0.6))
    ax.set_xticks(range(0, heads, max(1, heads // 12)))
    ax.set_yticks(range(0, layers, max(1, layers // 12)))
    ax.tick_params(length=0, labelsize=6.5, pad=1.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("head", labelpad=2)
    ax.set_ylabel("layer", labelpad=2)


def _verdicts(ax: Axes, rows: list[dict[str, Any]], tolerance: float) -> None:
    from matplotlib.patches import Patch

    colours = [_colour(row) for row in rows]
    texts = ["" if row.get("verdict") != "later" else _short(row["pays_from"]) for row in rows]
    _cells(ax, rows, colours, texts)
    ax.set_title(
        "From how many tokens on would they pay?", fontsize=8.5, loc="left", pad=31, x=-0.01
    )
    ax.text(
        -0.01,
        1.215,
        "faster from there than exact ones",
        fontsize=6.5,
        transform=ax.transAxes,
        va="top",
    )
    shown = [(label, colour) for label, colour, _ in CLASSES if colour in colours]
    shown += [(f"never at {tolerance:.0%}", NEVER)] * (NEVER in colours)
    handles = [Patch(facecolor=colour, label=label) for label, colour in shown]
    if REFUSED in colours:
        handles.append(
            Patch(
                facecolor=REFUSED,
                hatch="////",
                edgecolor="#BBBBBB",
                linewidth=0,
                label="not analysed",
            )
        )
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


def _scores(ax: Axes, rows: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = [
        max(row["norms"]["adapted"]["score_ratio"], 1e-3) if row.get("norms") else None
        for row in rows
    ]
    held = [0.5, 2.0, *(v for v in values if v is not None)]
    norm = LogNorm(min(held), max(held))
    colours = colormaps["YlOrBr"]
    texts = ["" if v is None else f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in values]
    _cells(ax, rows, [REFUSED if v is None else colours(0.85 * norm(v)) for v in values], texts)
    ax.set_title(
        r"How large are the scores? $R\,/\ln L$", fontsize=8.5, loc="left", pad=31, x=-0.01
    )
    ax.text(-0.01, 1.215, THEORY, fontsize=6.5, transform=ax.transAxes, va="top", linespacing=1.3)
    ax.set_ylabel("")


def _dials(diagnosis: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, what it says in large, a line below) of each dial."""
    norm, rank, batch = (diagnosis["dials"][name] for name in ("norm", "rank", "batch"))
    count = sum(not row["refused"] for row in diagnosis["heads"])
    needs = "less than a sixteenth" if norm["needs"] is None else f"{norm['needs']:.2g}"
    lines = [
        (
            "Norm bound",
            rf"$\Gamma$: {norm['is']:.2g}, needs {needs}",
            f"median head, with {norm['method']}, which {norm['pays']}",
        )
    ]
    if rank["full"] == count:
        lines.append(
            (
                "LoRA rank",
                "no rank helps",
                f"the frozen weights alone exceed the bound in all {count} heads",
            )
        )
    elif rank["is"] is None:
        lines.append(("LoRA rank", "ranks differ", "no one rank to turn"))
    elif rank["needs"] is None:
        lines.append(
            ("LoRA rank", "not the limit", "what the adapter adds leaves every tame head tame")
        )
    else:
        lines.append(
            (
                "LoRA rank",
                f"room for {rank['needs']:.0f}",
                f"where the bound leaves any; {rank['full']} of {count} heads exceed it frozen",
            )
        )
    if (batch["needs"] or 0) >= 1:
        below = (
            f"windows of {diagnosis['length']} tokens: the gradient's own noise hides an error of "
        )
        below += f"{diagnosis['tolerance']:.0%}"
        lines.append(("Mini-batch", f"up to {batch['needs']:.0f}", below))
    else:
        lines.append(
            (
                "Mini-batch",
                "no help",
                "the gradient's noise is below the error" if batch["is"] else "needs two windows",
            )
        )
    return lines


def fill(fig: Figure, diagnosis: dict[str, Any]) -> None:
    """Draws a diagnosis into an empty figure: headline, map of verdicts, map of score bounds, three
    dials.
    """
    rows = diagnosis["heads"]
    tolerance = f"{diagnosis['tolerance']:.0%}"
    now, later, never = (
        sum(row.get("verdict") == name for row in rows) for name in ("now", "later", "never")
    )
    head = f"Where would approximate LoRA gradients pay in {diagnosis['model']}?"
    fig.text(0.02, 0.965, head, fontsize=10.5, va="center")
    under = f"Of {len(rows)} heads: now in {now}, on longer texts in {later}, never in {never}, at {tolerance} error. "
    under += f"({diagnosis['windows']} windows of {diagnosis['length']} tokens, adapter: {diagnosis['adapter']})"
    fig.text(0.02, 0.92, under, fontsize=7, va="center", color="#555555")
    left = fig.add_axes((0.065, 0.31, 0.435, 0.44))
    right = fig.add_axes((0.55, 0.31, 0.435, 0.44))
    _verdicts(left, rows, diagnosis["tolerance"])
    _scores(right, rows)
    for place, (title, large, small) in enumerate(_dials(diagnosis) if diagnosis["dials"] else []):
        box = fig.add_axes((0.02 + 0.325 * place, 0.02, 0.31, 0.18))
        box.set(facecolor="#F2F2F2", xticks=[], yticks=[])
        for spine in box.spines.values():
            spine.set_visible(False)
        box.text(0.04, 0.84, title, fontsize=7, va="center", color="#555555")
        box.text(0.04, 0.58, large, fontsize=12, va="center")
        box.text(0.04, 0.36, textwrap.fill(small, 40), fontsize=6.5, va="top", linespacing=1.25)


def save(diagnosis: dict[str, Any], path: Path) -> Path:
    """Writes the picture as a PNG without a date."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        fig = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasAgg(fig)
        fill(fig, diagnosis)
        fig.savefig(path, metadata={"Software": None})
    return path
