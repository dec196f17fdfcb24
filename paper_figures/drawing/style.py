"""One look for every figure: the ICLR text block, stix serif, colour-blind safe, the same bytes
each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

WIDTH = 5.5  # inches
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
GREY = "#BBBBBB"
RC: dict[Any, Any] = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral"],
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.hashsalt": "lora_limits",
    "pdf.fonttype": 42,
}


def defaults(more: dict[Any, Any] | None = None) -> None:
    """Matplotlib's own defaults with the look of all figures and `more` laid over them.

    The user's matplotlibrc is laid aside: the same rows give the same bytes everywhere.
    """
    matplotlib.rcdefaults()
    plt.rcParams.update(RC | (more or {}))


def figure(height: float, rows: int = 1, columns: int = 1, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure of the text width and `height` inches with a grid of axes, always a 2-d array."""
    defaults()
    fig, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **kwargs
    )
    return fig, axes


def save(fig: Figure, stem: Path) -> list[Path]:
    """Writes stem.pdf and stem.png, with no date in either, and closes the figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
    fig.savefig(paths[0], metadata={"CreationDate": None})
    fig.savefig(paths[1], metadata={"Software": None})
    plt.close(fig)
    return paths


def note(fig: Figure, text: str) -> None:
    """A line at the foot of a figure, where it is not what it was meant to be."""
    fig.text(0.005, 0.005, text, fontsize=6, color=COLOURS[1], va="bottom", in_layout=False)


def empty(ax: Axes) -> None:
    """Says in a panel that its points have not been measured yet."""
    ax.text(0.5, 0.5, "no rows yet", transform=ax.transAxes, fontsize=7, ha="center", va="center")
    # Of this panel alone: the ticks of a shared axis stay where they are on the others.
    ax.tick_params(length=0, labelleft=False, labelbottom=False)


def say_where_empty(fig: Figure) -> None:
    """Says it in every panel that was left without data and without a word."""
    for ax in fig.axes:
        # Lines across all of a panel are no data: they have no place along it.
        has_data = np.isfinite(ax.dataLim.get_points()).all()
        if ax.axison and not has_data and not ax.texts:
            empty(ax)


def legend(ax: Axes, **look: Any) -> None:
    """A legend of the lines that there are; none where there are none."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**look)


def panel(ax: Axes, letter: str, title: str) -> None:
    """A panel's title, with its letter."""
    ax.set_title(f"({letter}) {title}", loc="left")


def edges(values: Sequence[float]) -> np.ndarray:
    """Cell edges around positive values on a log axis."""
    logs = np.log(np.asarray(values, float))
    if len(logs) == 1:
        return np.exp(logs[0] + np.array([-0.35, 0.35]))
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))


def headroom(ax: Axes, share: float) -> None:
    """Lengthens a log y axis upwards by a share of its decades: room for a legend."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** share)


def powers_of_two(ax: Axes, lengths: Sequence[int]) -> None:
    """Labels a log L axis by powers of two."""
    exponents = sorted({round(np.log2(n)) for n in lengths})
    spacing = (exponents[-1] - exponents[0]) / 6
    kept = exponents[:1]
    for exponent in exponents[1:]:
        if exponent - kept[-1] >= max(spacing, 1):
            kept.append(exponent)
    exponents = kept
    ax.set_xscale("log", base=2)
    ax.set_xticks([2.0**e for e in exponents], [f"$2^{{{e}}}$" for e in exponents])
    ax.minorticks_off()


def round_ticks(axis: Axis) -> None:
    """Labels a log axis of a few decades at 1, 2 and 5, in plain figures."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _place: f"{value:g}")
    axis.set_minor_locator(NullLocator())
