"""Fine-tuning runs on their way over the boundary, what holds them back, and what the certificate
says there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.drawing.tables import markdown

CONFIG = "crossing"
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, _ = style.COLOURS
BEYOND = 1e7  # bounds past it are counted, not drawn
SYMBOLS = {"rate": r"\eta", "rank": "r", "alpha": r"\alpha"}
CASES = {
    "as pretrained": (ORANGE, "v", "as pretrained"),
    "plain": (BLACK, "o", "no control"),
    "query-key norm": (BLUE, "s", "query-key norm"),
    "weight decay": (GREEN, "^", "weight decay"),
}


def centre(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rate, rank and alpha that most plain runs share; all runs, where none is plain yet."""
    plain = [row["point"] for row in rows if row["point"]["case"] == "plain"]
    plain = plain or [row["point"] for row in rows]
    return {name: _mode([point[name] for point in plain]) for name in SYMBOLS}


def _mode(values: list[Any]) -> Any:
    return max(sorted(set(values)), key=values.count)


def _largest(row: dict[str, Any], norm: str) -> np.ndarray:
    """The norm of the layer where it is largest, at every step looked at."""
    return np.max([layer[norm] for layer in row["metrics"]["layers"]], axis=0)


def _line(ax: Axes, row: dict[str, Any], **look: Any) -> None:
    look = {"markersize": 2.5, "linewidth": 1.0} | look
    ax.plot(row["metrics"]["steps"], _largest(row, "score"), **look)


def _along(ax: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """Runs that differ in one setting alone; dashed: alpha / sqrt(r)."""
    fixed = {n: x for n, x in centre(rows).items() if n != name}
    mine = [row for row in rows if all(row["point"][n] == x for n, x in fixed.items())]
    values = sorted({row["point"][name] for row in mine if row["point"]["case"] == "plain"})
    for row in sorted(mine, key=lambda row: row["point"][name]):
        case = row["point"]["case"]
        value = row["point"][name]
        # A run of another case may share the axis by chance.
        if value not in values or case not in ("plain", "alpha/sqrt(r)"):
            continue
        if case == "plain" or name == "rank":
            i = values.index(value)
            dash, label = (
                ("-", f"${SYMBOLS[name]} = {_number(value)}$") if case == "plain" else ("--", None)
            )
            _line(
                ax,
                row,
                linestyle=dash,
                color=(SKY, BLUE, RED, ORANGE, BLACK)[i],
                marker="os^vD"[i],
                label=label,
            )
    handles = ax.get_legend_handles_labels()[0]
    if name == "rank":
        handles.append(
            Line2D([], [], color=style.GREY, linestyle="--", label=r"scale $\alpha/\sqrt{r}$")
        )
    ax.legend(
        handles=handles, loc="upper left", handlelength=1.4, labelspacing=0.15, borderaxespad=0.1
    )


def _number(value: float) -> str:
    if value >= 0.1:
        return f"{value:g}"
    first, power = f"{value:e}".split("e")
    return (f"{float(first):g} \\cdot " if float(first) > 1 else "") + f"10^{{{int(power)}}}"


def _controls(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """The runs at the largest rate."""
    # Controls were tried where the norms grow fastest.
    own = centre(rows) | {"rate": max(row["point"]["rate"] for row in rows)}
    for case, (colour, marker, label) in CASES.items():
        for row in rows:
            if row["point"] == own | {"case": case}:
                _line(ax, row, color=colour, marker=marker, label=label)
    style.legend(ax, loc="upper left", handlelength=1.4, labelspacing=0.15, borderaxespad=0.1)


def _plane(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Every layer at every step, Gamma against R."""
    for case, (colour, marker, _) in CASES.items():
        for row in rows:
            if row["point"]["case"] == case:
                for layer in row["metrics"]["layers"]:
                    look: dict[str, Any] = {
                        "markersize": 2,
                        "alpha": 0.7,
                        "markeredgewidth": 0,
                        "linestyle": "none",
                    }
                    ax.plot(layer["score"], layer["gamma"], marker, color=colour, **look)
    ax.axhline(1, color=BLACK, linewidth=0.7, linestyle="--")
    ax.axvline(1, color=BLACK, linewidth=0.7, linestyle="--")
    for set_scale in (ax.set_xscale, ax.set_yscale):
        set_scale("log")
    ax.set_xticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
    ax.set_yticks([0.7, 1, 2, 4, 8], ["0.7", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.set_xlabel(r"$R / \ln L$")


def _certificates(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Median bound (full) and error (hollow) of every layer and step against the median R of its
    heads.
    """
    layers = [layer for row in rows for layer in row["metrics"]["layers"]]
    degrees = sorted(int(n.split()[1]) for n in layers[0] if n.startswith("bound"))
    for i, g in enumerate(degrees[:2]):
        x = np.concatenate([layer["median score"] for layer in layers])
        for name, fill in (("bound", "full"), ("error", "none")):
            y = np.concatenate([layer[f"{name} {g}"] for layer in layers])
            # Such a bound says nothing; a few of them would squeeze all others.
            y[y > BEYOND] = np.nan
            look: dict[str, Any] = {"color": (RED, BLUE)[i], "fillstyle": fill, "alpha": 0.7}
            look |= {"markersize": 2, "markeredgewidth": 0.4, "linestyle": "none"}
            ax.plot(x, y, "os"[i], label=f"{name}, $g={g}$", **look)
    ax.axhline(1, color=style.GREY, linewidth=0.7, linestyle="--", zorder=0)
    ax.axvline(1, ymax=0.8, color=BLACK, linewidth=0.7, linestyle="--")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks([0.3, 1, 3], ["0.3", "1", "3"])
    ax.minorticks_off()
    ax.set_xlabel(r"median $R / \ln L$")
    ax.set_ylim(1e-4, 1e11)
    names = ["$10^{-4}$", "$10^{-2}$", "1", "$10^2$", "$10^4$", "$10^6$"]
    ax.set_yticks([1e-4, 1e-2, 1, 1e2, 1e4, 1e6], names)
    bounds = np.concatenate([layer[f"bound {degrees[0]}"] for layer in layers])
    if beyond := int((bounds > BEYOND).sum()):
        place: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "top"}
        ax.text(0.98, 0.2, f"{beyond} bounds\nbeyond $10^7$", fontsize=6, **place)
    tight: dict[str, Any] = {
        "handletextpad": 0,
        "columnspacing": 0.4,
        "labelspacing": 0.15,
        "borderaxespad": 0.1,
    }
    ax.legend(loc="upper left", ncols=2, **tight)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) to (d): R / ln L of the layer where it is largest; (e), (f): every layer, head medians,
    at every step.
    """
    fig, axes = style.figure(3.9, 2, 3)
    for ax, letter, name, title in zip(
        axes[0], "abc", SYMBOLS, ("learning rate", "rank", "alpha"), strict=True
    ):
        _along(ax, rows, name)
        style.panel(ax, letter, title if title != "alpha" else r"$\alpha$")
    _controls(axes[1, 0], rows)
    style.panel(axes[1, 0], "d", "norm control")
    for ax in (*axes[0], axes[1, 0]):
        ax.axhline(1, color=BLACK, linewidth=0.7, linestyle="--", zorder=0)
        ax.set_yscale("log")
        ax.set_ylim(0.2, 40)
        ax.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
        ax.minorticks_off()
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$R / \ln L$")
    _plane(axes[1, 1], rows)
    axes[1, 1].set_ylabel(r"$\Gamma / \sqrt{\ln L}$", labelpad=1)
    style.panel(axes[1, 1], "e", "both norms")
    _certificates(axes[1, 2], rows)
    style.panel(axes[1, 2], "f", "certificate")
    return fig


def table(rows: list[dict[str, Any]]) -> str:
    """When each layer crosses, and what the certificate of the highest degree says there, in
    Markdown.
    """
    g = max(int(n.split()[1]) for n in rows[0]["metrics"]["layers"][0] if n.startswith("bound"))
    header = ["rate", "rank", "alpha", "case", "layer", "Gamma crosses", "R crosses"]
    header += [
        f"bound, g = {g}, where R (else Gamma) crosses",
        "error there",
        "normaliser there",
        "accuracy",
    ]
    lines = []
    for row in rows:
        point = row["point"]
        metrics = row["metrics"]
        for n, layer in enumerate(metrics["layers"]):
            at = [layer["crossed"][norm] for norm in ("gamma", "score")]
            step = at[1] if at[1] is not None else at[0]
            there = [""] * 3
            if step is not None:
                i = metrics["steps"].index(step)
                there = [
                    f"{layer[f'{name} {g}'][i]:.2g}" for name in ("bound", "error", "normaliser")
                ]
            cells = [
                f"{point['rate']:g}",
                str(point["rank"]),
                f"{point['alpha']:g}",
                point["case"],
                str(n + 1),
            ]
            cells += ["never" if x is None else f"step {x}" for x in at]
            lines.append([*cells, *there, f"{metrics['after']['accuracy']:.2f}"])
    return markdown(header, lines)
