"""Table 1 of the paper beside its theory: what softmax_1 does to norms, to the width needed and to
the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures.drawing import style
from paper_figures.drawing.tables import markdown

NAME = "outlier_free"
CONFIG = "outlier_free"
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, _ = style.COLOURS
# Minutes per epoch of Table 1: standard, outlier-free.
PAPER = {"125M": (58, 55), "350M": (69, 61), "1.3B": (84, 63)}
ATTENTIONS = {"softmax": (RED, "o"), "softmax_1": (BLUE, "s")}
FAMILIES = {
    "svd": (BLACK, "D", "SVD of $f$"),
    "sparse": (GREEN, "s", "sparse + low rank"),
    "skeleton": (ORANGE, "^", "skeleton"),
}
NORMS = {
    "gamma": r"$\Gamma/\sqrt{\ln L}$",
    "score": r"$R/\ln L$",
    "largest": "largest\nentry",
    "kurtosis": "kurtosis",
}
TOLERANCE = 0.1


def part(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Points and metrics of one part of the experiment, as one dictionary each."""
    return [row["point"] | row["metrics"] for row in rows if row["point"]["part"] == name]


def models(rows: list[dict[str, Any]]) -> list[str]:
    """The models there are, small to large."""
    return [name for name in PAPER if any(row["point"].get("model") == name for row in rows)]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """(a) norms and outliers; (b) error of the head gradients by width, median head; (c) time saved
    by softmax_1.
    """
    fig, axes = style.figure(2.6, 1, 3, width_ratios=(1.1, 1, 1.1))
    _norms(axes[0, 0], rows)
    style.panel(axes[0, 0], "a", "norms and outliers")
    _errors(axes[0, 1], rows)
    style.panel(axes[0, 1], "b", "relative error")
    _saved(axes[0, 2], rows)
    style.panel(axes[0, 2], "c", "time saved (%)")
    return fig


def _norms(ax: Axes, rows: list[dict[str, Any]]) -> None:
    names = models(rows)
    for row in part(rows, "features"):
        colour, marker = ATTENTIONS[row["attention"]]
        for i, norm in enumerate(NORMS):
            x = i + 0.22 * (names.index(row["model"]) - (len(names) - 1) / 2)
            x += 0.05 if row["attention"] == "softmax_1" else -0.05
            ax.plot(x, np.median(row[norm]), marker, color=colour, markersize=4)
    ax.set_yscale("log")
    ax.set_ylim(0.8, 400)
    ax.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    ax.minorticks_off()
    ax.set_xticks(range(len(NORMS)), list(NORMS.values()), fontsize=6)
    ax.text(0.02, 0.02, ", ".join(names), transform=ax.transAxes, fontsize=6)
    ax.tick_params(axis="x", length=0)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=_label(attention))
        for attention, (colour, marker) in ATTENTIONS.items()
    ]
    ax.legend(
        handles=handles,
        loc="upper left",
        ncols=2,
        handletextpad=0,
        columnspacing=0.6,
        borderaxespad=0.1,
    )


def _label(attention: str) -> str:
    return r"softmax$_1$" if attention == "softmax_1" else attention


def _errors(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Over all models, heads and LoRA ranks; solid: softmax, dashed: softmax_1."""
    for family, (colour, marker, _) in FAMILIES.items():
        for attention, dash in (("softmax", "-"), ("softmax_1", "--")):
            found: dict[int, list[float]] = {}
            for row in part(rows, "features"):
                if row["attention"] == attention:
                    for errors in row["errors"].values():
                        for name, values in errors.items():
                            if name.split()[0] == family:
                                found.setdefault(int(name.split()[1]), []).extend(values)
            widths = sorted(found)
            face = colour if attention == "softmax" else "white"
            look: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markerfacecolor": face,
                "linestyle": dash,
            }
            ax.plot(widths, [np.median(found[k]) for k in widths], **look)
    ax.axhline(TOLERANCE, color=BLACK, linewidth=0.7, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({int(n.split()[1]) for row in part(rows, "features") for n in _factors(row)})
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.set_xlabel("width $k$ (of 257 keys)")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.4)
    ax.annotate(
        "10 %",
        (1.5 * ticks[0], TOLERANCE),
        (0, -1),
        textcoords="offset points",
        fontsize=6,
        va="top",
    )
    handles = [Line2D([], [], color=c, marker=m, label=label) for c, m, label in FAMILIES.values()]
    handles.append(Line2D([], [], color=style.GREY, linestyle="--", label=r"dashed: softmax$_1$"))
    ax.legend(
        handles=handles, loc="upper right", handlelength=1.4, labelspacing=0.15, borderaxespad=0.1
    )


def _factors(row: dict[str, Any]) -> list[str]:
    return [
        name for errors in row["errors"].values() for name in errors if name.split()[0] in FAMILIES
    ]


def step_saving(row: dict[str, Any], name: str) -> float:
    """Per cent of the time of an exact softmax step that the step `name` saves; NaN where one is
    not there.
    """
    seconds = {n: t["seconds"] for n, t in row["steps"].items()}
    return 100 * (1 - seconds.get(name, np.nan) / seconds.get("softmax", np.nan))


def uncertainty(row: dict[str, Any], name: str) -> float:
    """Half the interquartile ranges of both times, in per cent of softmax's."""
    pair = [row["steps"].get(n, {"seconds": np.nan, "spread": np.nan}) for n in (name, "softmax")]
    return 50 * sum(t["spread"] for t in pair) / pair[1]["seconds"]


def head_seconds(row: dict[str, Any], errors: dict[str, list[float]]) -> float:
    """Mean over heads of the fastest approximate method within the tolerance, exact where there is
    none.
    """
    heads = len(next(iter(errors.values())))
    return float(
        np.mean(
            [
                _fastest(row, {name: values[n] for name, values in errors.items()})
                for n in range(heads)
            ]
        )
    )


def _fastest(row: dict[str, Any], errors: dict[str, float]) -> float:
    within = [n for n, error in errors.items() if error <= TOLERANCE and n in row["methods"]]
    return min((row["methods"][n]["seconds"] for n in within), default=row["exact"])


def approximate(rows: list[dict[str, Any]], model: str, rank: int) -> dict[str, float]:
    """Seconds of a head's approximate gradient by attention."""
    timed = [row for row in part(rows, "head") if row["rank"] == rank]
    return {
        row["attention"]: head_seconds(timed[0], row["errors"][str(rank)])
        for row in part(rows, "features")
        if row["model"] == model and timed
    }


def approximate_saving(rows: list[dict[str, Any]], model: str, rank: int) -> float:
    """Per cent of a softmax head's approximate time that softmax_1's saves."""
    seconds = approximate(rows, model, rank)
    return 100 * (1 - seconds.get("softmax_1", np.nan) / seconds.get("softmax", np.nan))


def _saved(ax: Axes, rows: list[dict[str, Any]]) -> None:
    names = models(rows)
    x = np.arange(len(names))
    paper = [100 * (1 - PAPER[name][1] / PAPER[name][0]) for name in names]
    ax.bar(x, paper, 0.7, color=style.GREY, zorder=0)
    looks = {
        "softmax_1": (BLUE, "s", r"softmax$_1$, exact"),
        "stretched": (RED, "o", "other norms, exact"),
    }
    for row in part(rows, "step"):
        for name, (colour, marker, _) in looks.items():
            at = names.index(row["model"]) + (-0.2 if name == "softmax_1" else 0)
            ax.errorbar(
                at,
                step_saving(row, name),
                uncertainty(row, name),
                fmt=marker,
                color=colour,
                elinewidth=0.7,
            )
        at = names.index(row["model"]) + 0.2
        ax.plot(
            at,
            approximate_saving(rows, row["model"], row["rank"]),
            "D",
            color=BLACK,
            fillstyle="none",
        )
    ax.axhline(0, color=BLACK, linewidth=0.6)
    ax.set_xticks(x, names)
    handles = [Line2D([], [], color=style.GREY, linewidth=5, label="Table 1")]
    handles += [
        Line2D([], [], color=c, marker=m, linestyle="none", label=label)
        for c, m, label in looks.values()
    ]
    handles.append(
        Line2D(
            [],
            [],
            color=BLACK,
            marker="D",
            fillstyle="none",
            linestyle="none",
            label="a head at 10 % error",
        )
    )
    ax.legend(
        handles=handles, loc="upper left", handlelength=1.2, labelspacing=0.15, borderaxespad=0.1
    )
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.7 * (high - low))


def needed(row: dict[str, Any], family: str) -> str:
    """The median over heads and ranks of the smallest width within the tolerance; "" where none was
    tried.
    """
    found = []
    for errors in row["errors"].values():
        widths = sorted(int(name.split()[1]) for name in errors if name.split()[0] == family)
        if not widths:
            return ""
        for n in range(len(errors[f"{family} {widths[0]}"])):
            found.append(
                min((k for k in widths if errors[f"{family} {k}"][n] <= TOLERANCE), default=np.inf)
            )
    middle = np.median(found)
    return "none" if np.isinf(middle) else f"{middle:g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Minutes per epoch in Markdown: of the paper, exact here, and with every head approximate at
    10 % error.
    """
    heads = {row["rank"]: row for row in part(rows, "head")}
    header = ["model", "attention", "Gamma / sqrt(ln L)", "R / ln L", "kurtosis"]
    header += [f"k at 10 %: {label.replace('$', '')}" for _, _, label in FAMILIES.values()]
    header += [
        "Table 1",
        "exact",
        "other norms, exact",
        *(f"approximate, r = {rank}" for rank in heads),
    ]
    steps = {row["model"]: row for row in part(rows, "step")}
    lines = []
    for row in part(rows, "features"):
        model = row["model"]
        attention = row["attention"]
        step = steps[row["model"]]
        epoch = step["sequences"] / 60
        seconds = {n: t["seconds"] for n, t in step["steps"].items()}
        norms = [f"{np.median(row[norm]):.1f}" for norm in ("gamma", "score", "kurtosis")]
        cells = [model, attention, *norms, *(needed(row, family) for family in FAMILIES)]
        other = f"{epoch * seconds['stretched']:.0f}" if attention == "softmax" else ""
        cells += [
            str(PAPER[model][list(ATTENTIONS).index(attention)]),
            f"{epoch * seconds[attention]:.0f}",
            other,
        ]
        for rank, timed in heads.items():
            saved = step["heads"] * (timed["exact"] - approximate(rows, model, rank)[attention])
            cells.append(f"{epoch * (seconds[attention] - saved):.0f}")
        lines.append(cells)
    return markdown(header, lines)
