"""Rows as a table for plots of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.runner import results

# The first that is installed makes the table. Polars would take a column's type from the first
# hundred lines, of which a column may have none.
FRAMES: dict[str, dict[str, Any]] = {
    "pandas": {},
    "polars": {"infer_schema_length": None, "strict": False},
}


def table(path: str | Path) -> Any:
    """The rows of a results folder, or of a file of kept rows: one line a point that finished.

    Columns: `point.NAME`, `metrics.NAME`, `fields.NAME` (what lies inside one of these goes on with
    dots: metrics.methods.exact.seconds; lists stay lists), `seconds`, `version`, `key` and `run`.
    A pandas data frame where pandas is installed, else a polars one, else a list of dicts.
    Raises Refused as `results.load`.
    """
    lines = [_flat(row) for row in results.load(path).rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    lines = [{name: line.get(name) for name in columns} for line in lines]
    for package, options in FRAMES.items():
        try:
            library = importlib.import_module(package)
        except ImportError:
            continue
        return library.DataFrame(lines, **options)
    return lines


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    parts = {name: row.get(name, {}) for name in ("point", "metrics", "fields")}
    rest = {name: row.get(name) for name in ("seconds", "version", "key", "run")}
    return dict(_walk(parts, "")) | rest


def _walk(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner
