"""Rows put among those that are kept in data/: checked first, shown, then replaced all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import Refused
from experiments.runner import results, store
from experiments.runner.config import SIZES
from experiments.runner.results import Results
from paper_figures.command.finding import STORED, is_results

# Of the machine, or of the run and not of its rows.
LEFT_OUT = ("argv", "planned", "runs")


def keep(folder: Path, *, force: bool) -> str:
    """Puts the results in a folder in place of those kept here, as NAME.jsonl and
    NAME.manifest.json; NAME.

    Raises Refused, and nothing is changed, for a folder without results, and unless `force` for
    rows that are missing or failed, that come from a tree with changes or from an unknown commit,
    or that would replace a larger size.
    """
    if not is_results(folder):
        raise Refused(f"--keep: got {folder}, expected a folder that a sweep wrote")
    found = results.load(folder)
    if found.manifest is None or not found.rows:
        raise Refused(f"--keep: got {folder} without rows and their manifest, expected both")
    name = found.manifest.get("name", found.manifest["experiment"])
    path = STORED / f"{name}.jsonl"
    beside = STORED / f"{name}.manifest.json"
    runs = _runs(folder, found)
    told = manifest(found, runs)
    before = results.load(path) if path.is_file() else None
    print(f"{path}: {_words(before) if before else 'nothing yet'}")
    print(f"{folder}: {_words(found)}")
    objections = _objections(found, runs, before)
    if objections and not force:
        told = "; ".join(objections)
        raise Refused(f"--keep: got {folder} with {told}; --force keeps it all the same")
    STORED.mkdir(exist_ok=True)
    rows = [*found.rows, *found.failed]
    lines = [json.dumps(store.encode(row), allow_nan=False) + "\n" for row in rows]
    store.replace({path: "".join(lines), beside: json.dumps(told, indent=1) + "\n"})
    return name


def _runs(folder: Path, found: Results) -> list[dict[str, Any]]:
    """The runs that measured any of the rows, oldest first; the last one's where rows do not say."""
    every = [one for told in store.read_manifests(folder) for one in [*told.get("runs", []), told]]
    measured = {row.get("run") for row in [*found.rows, *found.failed]}
    mine = sorted(
        (run for run in every if run.get("run") in measured), key=lambda r: r.get("started", "")
    )
    return mine or [found.manifest or {}]


def manifest(found: Results, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is told beside kept rows: all of the last run that measured any, of the others what may
    differ, and which points are missing.
    """
    # The size and config are those of the plan, whichever run measured the rows.
    plan = {name: value for name, value in (found.manifest or {}).items() if name not in LEFT_OUT}
    last = {name: value for name, value in runs[-1].items() if name not in LEFT_OUT}
    told = plan | last | {name: plan[name] for name in ("size", "config") if name in plan}
    count = {run.get("run"): 0 for run in runs}
    for row in found.rows:
        count[row.get("run")] = count.get(row.get("run"), 0) + 1
    names = ("run", "started", "commit", "dirty", "versions", "device", "processor", "cpus")
    merged = [
        {name: run.get(name) for name in names} | {"rows": count[run.get("run")]} for run in runs
    ]
    return told | {"missing": found.missing, "runs": merged if len(merged) > 1 else []}


def _objections(found: Results, runs: list[dict[str, Any]], before: Results | None) -> list[str]:
    """Why the rows are not kept unasked."""
    out = []
    if found.missing:
        out.append(f"{len(found.missing)} of {found.planned} points missing")
    if found.failed:
        out.append(f"{len(found.failed)} points failed")
    if any(run.get("dirty") is not False for run in runs):
        out.append("rows from a tree with changes, or from no known commit")
    sizes = [(each.manifest or {}).get("size") for each in (found, before) if each]
    if len(sizes) == 2 and all(size in SIZES for size in sizes):
        own, kept = sizes
        if SIZES.index(own) < SIZES.index(kept):
            out.append(f"{own} size in place of {kept} size")
    return out


def _words(found: Results) -> str:
    told = found.manifest or {}
    commit = (told.get("commit") or "an unknown commit")[:17]
    changes = " with changes" if told.get("dirty") else ""
    size = told.get("size", "an unknown")
    return f"{len(found.rows)} rows of {size} size, {commit[:8]}{changes}, {told.get('started')}"
