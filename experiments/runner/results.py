"""Results as those who read them want them: the rows of one plan, in its order, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import Refused
from experiments.runner import store
from experiments.runner.store import Row


@dataclass(frozen=True)
class Results:
    """What lies at `path`: a results folder, or rows kept in one file with a manifest beside it.

    rows: those that are "ok", of the points that the manifest plans and in its order. missing: the
    points planned without a row; failed: the rows of those that failed. others: how many rows there
    are of other points, left out of `rows`. manifest: of the last run; None where there is none.
    """

    path: Path
    rows: list[Row]
    missing: list[dict[str, Any]]
    failed: list[Row]
    others: int
    manifest: dict[str, Any] | None

    @property
    def planned(self) -> int:
        return len(self.rows) + len(self.missing) + len(self.failed)

    @property
    def fields_known(self) -> bool:
        """Whether every row says which fields it depends on; those of older versions do not."""
        return all("fields" in row for row in self.rows)


def load(path: str | Path) -> Results:
    """The results in a folder, all shards together, or in a file NAME.jsonl kept with its
    NAME.manifest.json.

    Raises Refused for a path without rows, for lines that are no rows, and where manifests, or rows
    without one, are of two plans.
    """
    path = Path(path)
    if path.is_dir():
        manifests = store.read_manifests(path)
        if not manifests and not list(path.glob("rows*.jsonl")):
            raise Refused(f"{path}: got a folder without rows*.jsonl, expected a results folder")
    else:
        beside = path.with_name(f"{path.stem}.manifest.json")
        manifests = [store.read_manifest(beside)] if beside.is_file() else []
    rows = {row["key"]: row for row in store.read(path)}
    # Where a manifest says whose plan it is, rows of another are others.
    check_one_plan(path, manifests or [*rows.values()])
    told = max(manifests, key=lambda each: each.get("started", ""), default=None)
    # A manifest of older versions, and one of kept rows, plans what is there.
    planned: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        planned |= manifest.get("planned", {})
    if not planned:
        planned = {key: row["point"] for key, row in rows.items()}
    mine = [rows[key] for key in planned if key in rows]
    kept_missing = (told or {}).get("missing", [])
    return Results(
        path,
        rows=[row for row in mine if row["status"] == "ok"],
        missing=[point for key, point in planned.items() if key not in rows] + kept_missing,
        failed=[row for row in mine if row["status"] == "failed"],
        others=len(rows) - len(mine),
        manifest=told,
    )


def identity(told: dict[str, Any]) -> dict[str, Any]:
    """Experiment, version and fields of a row or a manifest; of those that older versions wrote, as
    far as they say.
    """
    return {name: told[name] for name in store.IDENTITY if name in told}


def check_one_plan(path: Path, told: list[dict[str, Any]]) -> None:
    """Raises Refused where rows or manifests of one folder are of two plans."""
    first: dict[str, Any] = {}
    for each in map(identity, told):
        first = first or each
        if each != first:
            got = " beside ".join(differences(first, each))
            raise Refused(f"{path}: got results of two plans, {got}; expected those of one")


def differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    """What each of two identities says where they differ, in words."""
    if one.get("experiment") != other.get("experiment"):
        return f"of {one.get('experiment')}", f"of {other.get('experiment')}"
    if one.get("version") != other.get("version"):
        return f"of version {one.get('version')}", f"of version {other.get('version')}"
    if "fields" not in one or "fields" not in other:
        names = ("with" if "fields" in each else "without" for each in (one, other))
        first, second = (f"{name} the fields they depend on" for name in names)
        return first, second
    fields = [each["fields"] for each in (one, other)]
    names = [n for n in {**fields[0], **fields[1]} if fields[0].get(n) != fields[1].get(n)]
    first, second = (
        "with " + ", ".join(f"{n} = {each.get(n, 'unsaid')}" for n in names) for each in fields
    )
    return first, second
