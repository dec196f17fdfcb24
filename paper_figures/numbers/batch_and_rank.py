"""The error of an approximate gradient over the noise of its batch, and what each run lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from paper_figures.drawing.statistics import interval
from paper_figures.drawing.tables import markdown

AXES = ("norms", "rank", "batch", "rate")
NORMS = ("normalised", "shrunk", "free")


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
    """The norms, rank, batch and rate that most runs share; where there are none yet, most other points,
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
    return tuple(point[name] for name in ("norms", "rank", "rate", "seed"))


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
    rows: list[dict[str, Any]], name: str, way: int, *, below: bool, norms: str | None = None
) -> tuple[float, float, int] | None:
    """What is lost on one side of error = noise, by runs of one kind of norms or of all: mean,
    half-width of its 95 % interval over seeds, kinds of run.
    """
    groups = [group for group in _finite(rows, norms) if (typical(group) < 1) == below]
    by_seed: dict[int, list[float]] = {}
    for group in groups:
        for pair in group:
            by_seed.setdefault(pair["point"]["seed"], []).append(pair[name][way])
    means = [float(np.mean(by_seed[seed])) for seed in sorted(by_seed)]
    return (*interval(means), len(groups)) if means else None


def _finite(rows: list[dict[str, Any]], norms: str | None) -> list[list[dict[str, Any]]]:
    """The groups of some norms, of all where None, in which every run ended in a number."""
    return [
        group
        for group in grouped(rows)
        if norms in (None, group[0]["point"]["norms"]) and all(pair["finite"] for pair in group)
    ]


def regression(rows: list[dict[str, Any]], norms: str) -> tuple[float, float, float] | None:
    """Loss over exact training's against log10(error / noise) within one kind of norms, one point a
    kind of run: (slope, half-width of its 95 % interval, intercept). None for fewer than three
    kinds of run.
    """
    groups = _finite(rows, norms)
    if len(groups) < 3:
        return None
    x = np.log10([typical(group) for group in groups])
    y = [float(np.mean([pair["loss"][0] for pair in group])) for group in groups]
    fit: Any = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(groups) - 2) * fit.stderr)
    return float(fit.slope), half, float(fit.intercept)


def followed(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """{(norms, method): "steps"; over (seeds, steps) the "loss" less that of the exact run of the
    same seed, by its own method and, "served", under exact attention; and of the gradient error
    over noise, "ratio", and bias over noise, "bias"}.
    """
    runs = {
        tuple(row["point"][name] for name in ("norms", "method", "seed")): row["metrics"]
        for row in rows
        if row["point"]["kind"] == "followed"
    }
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for (norms, method, seed), own in runs.items():
        exact = runs.get((norms, "exact", seed))
        if method == "exact" or exact is None:
            continue
        noise, bias, variance = (np.array(own[name]) for name in ("noise", "bias", "variance"))
        bias = np.maximum(bias, 0)
        found = out.setdefault((norms, method), {"steps": own["steps"]})
        for name, value in (
            ("loss", np.subtract(own["test_loss"], exact["test_loss"])),
            ("served", np.subtract(own["exact_loss"], exact["exact_loss"])),
            ("ratio", np.sqrt((bias + variance) / noise)),
            ("bias", np.sqrt(bias / noise)),
        ):
            found.setdefault(name, []).append(value)
    return {key: {n: np.array(x) for n, x in found.items()} for key, found in out.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rule, by norms; runs that were followed; every kind of run: error over noise, loss and
    accuracy less those of exact training.
    """
    header = ["norms", "rank", "batch", "rate", "degree", "error / noise"]
    header += ["loss, own method", "loss, exact attention"]
    header += ["accuracy, own method", "accuracy, exact attention"]
    lines = []
    for below, side in ((True, "below"), (False, "above")):
        for norms in (None, *NORMS):
            found = [
                rule(rows, name, way, below=below, norms=norms)
                for name in ("loss", "accuracy")
                for way in (0, 1)
            ]
            cells = ["none" if f is None else f"{f[0]:+.3f} ± {f[1]:.3f}" for f in found]
            same = [g for g in grouped(rows) if norms in (None, g[0]["point"]["norms"])]
            same = [group for group in same if (typical(group) < 1) == below]
            bad = sum(not all(pair["finite"] for pair in group) for group in same)
            told = f"{len(same) - bad} kinds of run, {bad} more not finite"
            lines.append([f"error {side} noise, {norms or 'all'}", *[""] * 4, told, *cells])
    for (norms, method), found in followed(rows).items():
        scores = [interval(found[way][:, -1]) for way in ("loss", "served")]
        ends = f"{np.median(found['ratio'][:, 0]):.2g} to {np.median(found['ratio'][:, -1]):.2g}"
        told = [*(f"{mean:+.3f} ± {half:.3f}" for mean, half in scores), "", ""]
        where = [f"followed for {found['steps'][-1]} steps, {norms}", "", "", ""]
        lines.append([*where, method.split()[1], ends, *told])
    for group in sorted(grouped(rows), key=typical):
        point = group[0]["point"]
        degree = point["method"].split()[1]
        cells = [point["norms"], str(point["rank"]), str(point["batch"])]
        cells += [f"{point['rate']:g}", degree]
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
