"""The error of an approximate gradient over the noise of its batch, and what each run lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from paper_figures.drawing.statistics import interval
from paper_figures.drawing.tables import markdown

AXES = ("norms", "rank", "batch")


def ratio(exact: dict[str, float], error: dict[str, float], batch: float) -> float:
    """Error over noise of a batch, root mean squares: sqrt((mean + spread / b) / (exact's spread /
    b)).
    """
    return float(np.sqrt((max(error["mean"], 0) * batch + error["spread"]) / exact["spread"]))


def crossing(exact: dict[str, float], error: dict[str, float]) -> float:
    """b*, from which the error is the larger of the two; 0 where it always is, inf where no batch
    shows it.
    """
    if np.isnan(error["mean"]):
        return np.nan
    if error["mean"] <= 0:
        return np.inf
    return max(exact["spread"] - error["spread"], 0) / error["mean"]


def reference(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The norms, rank and batch that most runs share; where there are none yet, most other points,
    and None for what these do not have.
    """
    runs = [row["point"] for row in rows if row["point"]["kind"] == "run"]
    points = runs or [row["point"] for row in rows]
    values = {name: [point.get(name) for point in points] for name in AXES}
    return {name: max(dict.fromkeys(each), key=each.count) for name, each in values.items()}


def degrees(rows: list[dict[str, Any]]) -> list[int]:
    """The degrees there are runs of."""
    names = {row["point"]["method"] for row in rows if row["point"]["kind"] == "run"} - {"exact"}
    return sorted(int(name.split()[1]) for name in names)


def moments(
    rows: list[dict[str, Any]], stage: str, **where: Any
) -> list[dict[str, dict[str, float]]]:
    """The moments before or after training, of each seed, where the point is as said."""
    wanted = {"kind": "noise", **where}
    return [
        row["metrics"][stage]["moments"]
        for row in rows
        if all(row["point"].get(name) == x for name, x in wanted.items())
    ]


def _place(point: dict[str, Any]) -> tuple[Any, ...]:
    """What a run and the noise that it is held against share."""
    return tuple(point[name] for name in ("norms", "rank", "seed"))


def paired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every approximate run beside the exact one of its seed: its point, the error over noise, and
    what it lost.

    "ratio": the larger of before and after exact training. "loss", "accuracy": (by own method, by
    exact attention), less those of exact training; loss is better below 0, accuracy above.
    """
    runs = {tuple(row["point"].values()): row for row in rows if row["point"]["kind"] == "run"}
    noises = {
        _place(row["point"]): row["metrics"] for row in rows if row["point"]["kind"] == "noise"
    }
    out = []
    for row in runs.values():
        point = row["point"]
        metrics = row["metrics"]
        if point["method"] == "exact":
            continue
        base = runs.get(tuple((point | {"method": "exact"}).values()))
        noise = noises.get(_place(point))
        if base is None or noise is None:
            continue
        stages = [noise[stage]["moments"] for stage in ("before", "after")]
        ratios = [ratio(m["exact"], m[point["method"]], point["batch"]) for m in stages]
        pair = {"point": point, "ratio": float(np.max(ratios)), "finite": metrics["finite"]}
        for name in ("loss", "accuracy"):
            reached = base["metrics"]["own"][name]
            pair[name] = tuple(metrics[way][name] - reached for way in ("own", "exact"))
        out.append(pair)
    return out


def grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Pairs that differ in their seed alone."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for pair in paired(rows):
        groups.setdefault(tuple(pair["point"][n] for n in (*AXES, "method")), []).append(pair)
    return list(groups.values())


def typical(group: list[dict[str, Any]]) -> float:
    """The geometric mean of a group's ratios."""
    return float(np.exp(np.mean(np.log([pair["ratio"] for pair in group]))))


def rule(
    rows: list[dict[str, Any]], name: str, way: int, *, below: bool
) -> tuple[float, float, int] | None:
    """What is lost on one side of error = noise: mean, half-width of its 95 % interval over seeds,
    kinds of run.
    """
    finite = [group for group in grouped(rows) if all(pair["finite"] for pair in group)]
    groups = [group for group in finite if (typical(group) < 1) == below]
    by_seed: dict[int, list[float]] = {}
    for group in groups:
        for pair in group:
            by_seed.setdefault(pair["point"]["seed"], []).append(pair[name][way])
    means = [float(np.mean(by_seed[seed])) for seed in sorted(by_seed)]
    return (*interval(means), len(groups)) if means else None


def table(rows: list[dict[str, Any]]) -> str:
    """The rule, then every kind of run: error over noise, and loss and accuracy less those of exact
    training.
    """
    header = ["norms", "rank", "batch", "degree", "error / noise"]
    header += ["loss, own method", "loss, exact attention"]
    header += ["accuracy, own method", "accuracy, exact attention"]
    lines = []
    for below, text in ((True, "error below noise"), (False, "error above noise")):
        found = [
            rule(rows, name, way, below=below) for name in ("loss", "accuracy") for way in (0, 1)
        ]
        cells = ["none" if f is None else f"{f[0]:+.3f} ± {f[1]:.3f}" for f in found]
        side = [group for group in grouped(rows) if (typical(group) < 1) == below]
        bad = sum(not all(pair["finite"] for pair in group) for group in side)
        count = found[0][2] if found[0] else 0
        told = f"{count} kinds of run, {bad} more not finite"
        lines.append([text, "", "", "", told, *cells])
    for group in sorted(grouped(rows), key=typical):
        point = group[0]["point"]
        degree = point["method"].split()[1]
        cells = [point["norms"], str(point["rank"]), str(point["batch"]), degree]
        scores = [
            interval(pair[name][way] for pair in group)
            for name in ("loss", "accuracy")
            for way in (0, 1)
        ]
        told = [f"{mean:+.3f} ± {half:.3f}" for mean, half in scores]
        if failed := sum(not pair["finite"] for pair in group):
            told = [f"{failed} of {len(group)} not finite"] * 4
        lines.append([*cells, f"{typical(group):.2g}", *told])
    return markdown(header, lines)
