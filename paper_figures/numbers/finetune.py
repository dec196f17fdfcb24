"""Runs of the training experiment by task and method, and what they lose beside exact training."""

from __future__ import annotations

from typing import Any

import numpy as np

from paper_figures.drawing.statistics import interval

TASKS = {
    "digits": "digits",
    "prose_or_code": "prose\nor code",
    "which_module": "which\nmodule",
    "next_byte": "next\nbyte",
}
Runs = dict[str, dict[int, dict[str, Any]]]


def runs(rows: list[dict[str, Any]], case: str, task: str) -> Runs:
    """{method: {seed: metrics of its run}} in the order of the rows."""
    out: Runs = {}
    for row in rows:
        point = row["point"]
        if (point["kind"], point["case"], point["task"]) == ("run", case, task):
            out.setdefault(point["method"], {})[point["seed"]] = row["metrics"]
    return out


def over_exact(found: Runs, method: str) -> list[float]:
    """Points of accuracy over exact training's, seed by seed, of the seeds that both were run with:
    they start from the same base and see the same data.
    """
    exact = found.get("exact", {})
    return [
        100 * own["final"]["accuracy"] - 100 * exact[seed]["final"]["accuracy"]
        for seed, own in found[method].items()
        if seed in exact
    ]


def steps(rows: list[dict[str, Any]], case: str, task: str) -> dict[str, dict[str, float]]:
    """{method: seconds and temporary bytes of a step}, "exact" being the fastest exact
    contender.
    """
    for row in rows:
        point = row["point"]
        metrics = row["metrics"]
        if (point["kind"], point["case"], point["task"]) == ("time", case, task):
            return metrics["methods"] | {"exact": metrics["methods"][metrics["best"]]}
    return {}


def margin(rows: list[dict[str, Any]]) -> float:
    """Points of accuracy within which training counts as equivalent, set before it ran."""
    return 100 * rows[0]["fields"]["margin"]


def verdict(rows: list[dict[str, Any]], differences: list[float]) -> str:
    """Whether the 95 % interval of the differences lies within the margin, or beyond it."""
    most = margin(rows)
    mean, half = interval(differences)
    if not np.isfinite(mean):
        return "beyond"
    if len(differences) < 2:
        half = np.inf  # one seed shows nothing of the next
    if mean + half < -most or mean - half > most:
        return "beyond"
    within = -most < mean - half and mean + half < most
    return "within" if within else "not shown to be within"


def lengths_of(rows: list[dict[str, Any]], case: str) -> dict[tuple[str, str], int]:
    """{(case, task): L} of the short or the long tasks."""
    return {
        (case, row["point"]["task"]): row["point"]["length"]
        for row in rows
        if row["point"]["case"] == case
    }
