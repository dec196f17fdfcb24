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
from paper_figures.drawing.statistics import interval
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


def _largest(metrics: dict[str, Any], norm: str) -> np.ndarray:
    """The norm of the layer where it is largest, at every step looked at."""
    return np.max([layer[norm] for layer in metrics["layers"]], axis=0)


def runs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(point without its seed, metrics of its seeds) in the order of the rows."""
    out: dict[tuple[Any, ...], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for row in rows:
        point = {name: x for name, x in row["point"].items() if name != "seed"}
        out.setdefault(tuple(point.values()), (point, []))[1].append(row)
    return [(point, [row["metrics"] for row in own]) for point, own in out.values()]


def _line(ax: Axes, seeds: list[dict[str, Any]], **look: Any) -> None:
    """The geometric mean of R over the seeds, and a band from the least to the largest."""
    look = {"markersize": 2.5, "linewidth": 1.0} | look
    ratios = np.stack([_largest(metrics, "score") for metrics in seeds])
    steps = seeds[0]["steps"]
    ax.plot(steps, np.exp(np.log(ratios).mean(0)), **look)
    ax.fill_between(
        steps, ratios.min(0), ratios.max(0), color=look["color"], alpha=0.18, linewidth=0
    )


def _along(ax: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """Runs that differ in one setting alone; dashed: alpha / sqrt(r)."""
    fixed = {n: x for n, x in centre(rows).items() if n != name}
    mine = [run for run in runs(rows) if all(run[0][n] == x for n, x in fixed.items())]
    values = sorted({point[name] for point, _ in mine if point["case"] == "plain"})
    for point, seeds in sorted(mine, key=lambda run: run[0][name]):
        case, value = point["case"], point[name]
        # A run of another case may share the axis by chance.
        if value not in values or case not in ("plain", "alpha/sqrt(r)"):
            continue
        if case == "plain" or name == "rank":
            i = values.index(value)
            dash, label = (
                ("-", f"${SYMBOLS[name]} = {_number(value)}$") if case == "plain" else ("--", None)
            )
            look = {"color": (SKY, BLUE, RED, ORANGE, BLACK)[i], "marker": "os^vD"[i]}
            _line(ax, seeds, linestyle=dash, label=label, **look)
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
        for point, seeds in runs(rows):
            if point == own | {"case": case}:
                _line(ax, seeds, color=colour, marker=marker, label=label)
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
    """(a) to (d): R / ln L of the layer where it is largest, mean and range of the seeds; (e), (f):
    every layer, head medians, at every step.
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


def crossed(seeds: list[dict[str, Any]], norm: str, layer: int | None = None) -> str:
    """The steps at which a norm passes its boundary, least to largest over the seeds, in one layer
    or the first of all; how many seeds cross, where not all do.
    """
    found = []
    for metrics in seeds:
        layers = metrics["layers"] if layer is None else [metrics["layers"][layer]]
        steps = [own["crossed"][norm] for own in layers if own["crossed"][norm] is not None]
        found += [min(steps)] if steps else []
    if not found:
        return "never"
    low, high = min(found), max(found)
    told = f"step {low}" if low == high else f"step {low} to {high}"
    return told if len(found) == len(seeds) else f"{told} ({len(found)} of {len(seeds)} seeds)"


def _there(seeds: list[dict[str, Any]], layer: int, name: str) -> str:
    """The range over seeds of what a layer has where R (else Gamma) crosses."""
    found = []
    for metrics in seeds:
        own = metrics["layers"][layer]
        at = [own["crossed"][norm] for norm in ("score", "gamma")]
        step = next((step for step in at if step is not None), None)
        if step is not None:
            found.append(own[name][metrics["steps"].index(step)])
    if not found:
        return ""
    low, high = (f"{x:.2g}" for x in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


def table(rows: list[dict[str, Any]]) -> str:
    """When each layer crosses, and what the certificate of the highest degree says there, in
    Markdown: least to largest over the seeds.
    """
    g = max(int(n.split()[1]) for n in rows[0]["metrics"]["layers"][0] if n.startswith("bound"))
    header = ["rate", "rank", "alpha", "case", "layer", "Gamma crosses", "R crosses"]
    header += [
        f"bound, g = {g}, where R (else Gamma) crosses",
        "error there",
        "normaliser there",
        "accuracy (95 %)",
    ]
    lines = []
    for point, seeds in runs(rows):
        mean, half = interval(metrics["after"]["accuracy"] for metrics in seeds)
        for n in range(len(seeds[0]["layers"])):
            cells = [
                f"{point['rate']:g}",
                str(point["rank"]),
                f"{point['alpha']:g}",
                point["case"],
                str(n + 1),
            ]
            cells += [crossed(seeds, norm, n) for norm in ("gamma", "score")]
            cells += [_there(seeds, n, f"{name} {g}") for name in ("bound", "error", "normaliser")]
            lines.append([*cells, f"{mean:.3f} ± {half:.3f}"])
    return markdown(header, lines)
