"""The picture of a diagnosis: where approximate gradients would pay, why not, and three dials."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_limits.diagnose import maps
from lora_limits.diagnose.summary import headline, heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.5, 4.3  # inches
RC: dict[Any, Any] = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral"],
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 200,
}
GREY = "#555555"

# Of a dial: its title, what it says in large, a line below.
Dial = tuple[str, str, str]


def _dials(diagnosis: dict[str, Any]) -> list[Dial]:
    """The three dials; none where no head was analysed."""
    if not diagnosis["dials"]:
        return []
    count = sum(not row["refused"] for row in diagnosis["heads"])
    dials = diagnosis["dials"]
    return [_norm(dials["norm"]), _rank(dials["rank"], count), _batch(dials["batch"], diagnosis)]


def _norm(norm: dict[str, Any]) -> Dial:
    needs = "less than a sixteenth" if norm["needs"] is None else f"{norm['needs']:.2g}"
    below = f"median head, with {norm['method']}, which {norm['pays']}"
    return "Norm bound", rf"$\Gamma$: {norm['is']:.2g}, needs {needs}", below


def _rank(rank: dict[str, Any], count: int) -> Dial:
    """count: heads analysed."""
    if rank["full"] == count:
        large = "no rank helps"
        below = f"the frozen weights alone exceed the bound in all {count} heads"
    elif rank["is"] is None:
        large = "ranks differ"
        below = "no one rank to turn"
    elif rank["needs"] is None:
        large = "not the limit"
        below = "what the adapter adds leaves every tame head tame"
    else:
        large = f"room for {rank['needs']:.0f}"
        below = f"where the bound leaves any; {rank['full']} of {count} heads exceed it frozen"
    return "LoRA rank", large, below


def _batch(batch: dict[str, Any], diagnosis: dict[str, Any]) -> Dial:
    if (batch["needs"] or 0) >= 1:
        large = f"up to {batch['needs']:.0f}"
        below = f"windows of {diagnosis['length']} tokens: the gradient's own noise hides an error"
        below += f" of {diagnosis['tolerance']:.0%}"
    else:
        large = "no help"
        below = "the gradient's noise is below the error" if batch["is"] else "needs two windows"
    return "Mini-batch", large, below


def _headlines(fig: Figure, diagnosis: dict[str, Any]) -> None:
    """What to do, and in small the counts that say so."""
    fig.text(0.02, 0.965, headline(diagnosis), fontsize=10.5, va="center")
    told = f"Heads: {heads(diagnosis)}, at {diagnosis['tolerance']:.0%} error"
    windows = f"{diagnosis['windows']} windows of {diagnosis['length']:,} tokens"
    task = diagnosis.get("task") or "stand-in"
    under = f"{told} ({windows}, task: {task}, adapter: {diagnosis['adapter']})"
    fig.text(0.02, 0.94, textwrap.fill(under, 130), fontsize=6.5, va="top", color=GREY)


def fill(fig: Figure, diagnosis: dict[str, Any]) -> None:
    """Draws a diagnosis into an empty figure: headline, two maps of the heads, three dials."""
    _headlines(fig, diagnosis)
    left = fig.add_axes((0.065, 0.31, 0.435, 0.44))
    right = fig.add_axes((0.55, 0.31, 0.435, 0.44))
    maps.verdicts(left, diagnosis["heads"], diagnosis["tolerance"])
    maps.scores(right, diagnosis["heads"])
    for place, (title, large, small) in enumerate(_dials(diagnosis)):
        box = fig.add_axes((0.02 + 0.325 * place, 0.02, 0.31, 0.18))
        box.set(facecolor="#F2F2F2", xticks=[], yticks=[])
        for spine in box.spines.values():
            spine.set_visible(False)
        box.text(0.04, 0.84, title, fontsize=7, va="center", color=GREY)
        box.text(0.04, 0.58, large, fontsize=12, va="center")
        below = textwrap.fill(small, 40)
        box.text(0.04, 0.36, below, fontsize=6.5, va="top", linespacing=1.25)


def save(diagnosis: dict[str, Any], path: Path) -> Path:
    """Writes the picture as a PNG without a date: the same diagnosis gives the same file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The user's own matplotlibrc is laid aside, so that the same diagnosis gives the same file.
    # Without pyplot, which would look for a display.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        fig = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasAgg(fig)
        fill(fig, diagnosis)
        fig.savefig(path, metadata={"Software": None})
    return path
