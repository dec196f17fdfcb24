"""Minutes per epoch of Table 1 beside those measured, and the width heads need at 10 % error."""

from __future__ import annotations

from typing import Any

import numpy as np

from paper_figures.drawing.tables import markdown

# Minutes per epoch of Table 1: standard, outlier-free.
PAPER = {"125M": (58, 55), "350M": (69, 61), "1.3B": (84, 63)}
ATTENTIONS = ("softmax", "softmax_1")
FAMILIES = {"svd": "SVD of $f$", "sparse": "sparse + low rank", "skeleton": "skeleton"}
TOLERANCE = 0.1
NORMS = ("gamma", "score", "largest", "kurtosis")


def part(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Points and metrics of one part of the experiment, as one dictionary each."""
    return [row["point"] | row["metrics"] for row in rows if row["point"]["part"] == name]


def features(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The features of each model and attention: norms and errors of the heads of all seeds, one
    after the other, and of each "norms", the median head by seed.
    """
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for row in part(rows, "features"):
        new = {name: row[name] for name in ("model", "attention")}
        new |= {"errors": {}, "norms": {norm: [] for norm in NORMS}}
        found = out.setdefault((row["model"], row["attention"]), new)
        for norm in NORMS:
            found["norms"][norm].append(float(np.median(row[norm])))
        for rank, errors in row["errors"].items():
            own = found["errors"].setdefault(rank, {})
            for method, values in errors.items():
                own.setdefault(method, []).extend(values)
    return list(out.values())


def models(rows: list[dict[str, Any]]) -> list[str]:
    """The models there are, small to large."""
    return [name for name in PAPER if any(row["point"].get("model") == name for row in rows)]


def errors_by_width(
    rows: list[dict[str, Any]], family: str, attention: str
) -> dict[int, list[float]]:
    """{width: errors} of a family of factors, over all models, heads and LoRA ranks."""
    found: dict[int, list[float]] = {}
    for row in features(rows):
        if row["attention"] != attention:
            continue
        for errors in row["errors"].values():
            for name, values in errors.items():
                if name.split()[0] == family:
                    found.setdefault(int(name.split()[1]), []).extend(values)
    return found


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
    by_head = [{name: values[n] for name, values in errors.items()} for n in range(heads)]
    return float(np.mean([_fastest(row, own) for own in by_head]))


def _fastest(row: dict[str, Any], errors: dict[str, float]) -> float:
    within = [n for n, error in errors.items() if error <= TOLERANCE and n in row["methods"]]
    return min((row["methods"][n]["seconds"] for n in within), default=row["exact"])


def approximate(rows: list[dict[str, Any]], model: str, rank: int) -> dict[str, float]:
    """Seconds of a head's approximate gradient by attention."""
    timed = [row for row in part(rows, "head") if row["rank"] == rank]
    return {
        row["attention"]: head_seconds(timed[0], row["errors"][str(rank)])
        for row in features(rows)
        if row["model"] == model and timed
    }


def approximate_saving(rows: list[dict[str, Any]], model: str, rank: int) -> float:
    """Per cent of a softmax head's approximate time that softmax_1's saves."""
    seconds = approximate(rows, model, rank)
    return 100 * (1 - seconds.get("softmax_1", np.nan) / seconds.get("softmax", np.nan))


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
            enough = [k for k in widths if errors[f"{family} {k}"][n] <= TOLERANCE]
            found.append(min(enough, default=np.inf))
    middle = np.median(found)
    return "none" if np.isinf(middle) else f"{middle:g}"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def table(rows: list[dict[str, Any]]) -> str:
    """Minutes per epoch in Markdown: of the paper, exact here, and with every head approximate at
    10 % error.
    """
    heads = {row["rank"]: row for row in part(rows, "head")}
    header = ["model", "attention", "Gamma / sqrt(ln L)", "R / ln L", "kurtosis"]
    header += [f"k at 10 %: {label.replace('$', '')}" for label in FAMILIES.values()]
    header += ["Table 1", "exact", "other norms, exact"]
    header += [f"approximate, r = {rank}" for rank in heads]
    steps = {row["model"]: row for row in part(rows, "step")}
    lines = []
    for row in features(rows):
        model = row["model"]
        attention = row["attention"]
        # What has not been timed yet is nan.
        step = steps.get(model, {"sequences": np.nan, "heads": np.nan, "steps": {}})
        epoch = step["sequences"] / 60
        seconds = dict.fromkeys((*ATTENTIONS, "stretched"), np.nan)
        seconds |= {n: t["seconds"] for n, t in step["steps"].items()}
        norms = [_range(row["norms"][norm]) for norm in ("gamma", "score", "kurtosis")]
        cells = [model, attention, *norms, *(needed(row, family) for family in FAMILIES)]
        other = f"{epoch * seconds['stretched']:.0f}" if attention == "softmax" else ""
        published = PAPER[model][ATTENTIONS.index(attention)]
        cells += [str(published), f"{epoch * seconds[attention]:.0f}", other]
        for rank, timed in heads.items():
            saved = step["heads"] * (timed["exact"] - approximate(rows, model, rank)[attention])
            cells.append(f"{epoch * (seconds[attention] - saved):.0f}")
        lines.append(cells)
    return markdown(header, lines)
