"""Training by exact and by approximate gradients along its steps: loss, and error of the gradient,
on every task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.drawing import style
from paper_figures.drawing.training import colours_of, legend, losses
from paper_figures.numbers.finetune import TASKS, Runs, lengths_of, runs

CONFIG = "finetune"


def _errors(ax: Axes, found: Runs, colours: dict[str, str]) -> None:
    """Median over seeds of the gradient's relative error (solid) and of 1 - cosine (dotted), along
    training.
    """
    for method, by_seed in found.items():
        metrics = list(by_seed.values())
        if "error" in metrics[0]:
            x = metrics[0]["steps"]
            error = np.median([m["error"] for m in metrics], axis=0)
            away = 1 - np.median([m["cosine"] for m in metrics], axis=0)
            ax.plot(x, error, "o-", color=colours[method], markersize=2, linewidth=0.9)
            ax.plot(
                x, np.maximum(away, 1e-7), "o:", color=colours[method], markersize=2, linewidth=0.9
            )
    ax.set_yscale("log")
    ax.set_ylim(3e-8, 2)
    ax.set_yticks([1e-6, 1e-4, 1e-2, 1])
    ax.minorticks_off()
    ax.set_xlabel("step")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Above: training loss, mean of the seeds; below: relative Frobenius error of the gradient
    (solid) and 1 - cosine (dotted), medians of the seeds. One column a task.
    """
    lengths = lengths_of(rows, "short") | lengths_of(rows, "long")
    colours = colours_of(rows)
    fig, axes = style.figure(3.4, 2, max(len(lengths), 1))
    letters = iter("abcdefghijklmnop")
    for row, (paint, label) in enumerate(
        ((losses, "training loss"), (_errors, "error; $1 - $cos dotted"))
    ):
        for ax, ((case, task), length) in zip(axes[row], lengths.items(), strict=False):
            paint(ax, runs(rows, case, task), colours)
            title = TASKS[task].replace("\n", " ") if row == 0 else ""
            style.panel(ax, next(letters), title)
            if row == 0:
                place: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "top"}
                ax.text(0.98, 0.97, f"$L = {length}$", fontsize=7, **place)
        axes[row, 0].set_ylabel(label)
    legend(fig, colours)
    return fig
