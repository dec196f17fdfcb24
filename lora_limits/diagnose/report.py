"""A diagnosis as a table on the terminal and as JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

FILE, PICTURE = "diagnosis.json", "diagnosis.png"


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as None, at any depth."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(diagnosis: dict[str, Any], out: Path) -> Path:
    """Writes out/diagnosis.json, all or nothing."""
    # A run that is killed while writing leaves the last whole diagnosis.
    path = out / FILE
    partial = out / f"{FILE}.partial"
    text = json.dumps(finite(diagnosis), indent=1, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def verdict(row: dict[str, Any], tolerance: float) -> str:
    """The verdict of a head in words."""
    if row["refused"]:
        return f"refused: {row['refused']}"
    if row["verdict"] == "never":
        return f"never at {tolerance:.0%}"
    return "pays now" if row["verdict"] == "now" else f"pays from {row['pays_from']:,} tokens"


def _cells(row: dict[str, Any], tolerance: float) -> list[str]:
    """A row of the table, empty where a head was refused before it was known."""
    head = [f"{row['layer']}.{row['head']}"]
    if "norms" not in row:
        return [*head, *[""] * 10, verdict(row, tolerance)]
    frozen = row["norms"]["frozen"]
    adapted = row["norms"]["adapted"]
    head += [
        f"{adapted['gamma_ratio']:.2f}",
        f"{adapted['gamma_ratio_centred']:.2f}",
        f"{frozen['score_ratio']:.2f}",
        f"{adapted['score_ratio']:.2f}",
    ]
    if row["refused"]:
        return [*head, *[""] * 6, verdict(row, tolerance)]
    longer = "" if row["error_longer"] is None else f"{row['error_longer']:.2g}"
    seconds = row["seconds"]
    predicted = seconds["predicted"]
    foreseen = "" if predicted is None else f"{seconds['exact'] / predicted:.2g}"
    # None is how JSON holds an infinite error.
    error = math.inf if row["error"] is None else row["error"]
    worst = f"{error:.2g}" if error < 1e3 else "> 1000"
    noise = "" if row["noise"] is None else f"{row['noise']:.0%}"
    speed = f"{seconds['exact'] / seconds['method']:.2g}"
    return [*head, row["method"], worst, longer, speed, foreseen, noise, verdict(row, tolerance)]


def table(diagnosis: dict[str, Any]) -> Any:
    """A rich table, one row a head."""
    from rich import box
    from rich.table import Table

    size = f"{diagnosis['windows']} windows of {diagnosis['length']} tokens"
    out = Table(
        title=f"{diagnosis['model']}: {size}, adapter: {diagnosis['adapter']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = ("head", "Γ/√ln L", "centred", "R/ln L frozen", "adapted", "method", "error")
    for name in (*columns, "on longer", "speed-up", "predicted", "noise", "verdict"):
        out.add_column(name, justify="left" if name in ("method", "verdict") else "right")
    for row in diagnosis["heads"]:
        out.add_row(*_cells(row, diagnosis["tolerance"]))
    return out


def words(diagnosis: dict[str, Any]) -> list[str]:
    """What the table means: counts, the three dials, and how the diagnosis was made."""
    rows = diagnosis["heads"]
    verdicts = [row.get("verdict") for row in rows]
    now, later, never = (verdicts.count(name) for name in ("now", "later", "never"))
    refused = sum(bool(row["refused"]) for row in rows)
    lines = [
        f"Of {len(rows)} heads, {now} pay now, {later} at longer lengths, {never} never "
        f"at {diagnosis['tolerance']:.0%} error with the methods tried, and {refused} are refused."
    ]
    names = {"norm": "Norm bound", "rank": "LoRA rank", "batch": "Mini-batch"}
    lines += [f"{names[name]}. {dial['text']}" for name, dial in diagnosis["dials"].items()]
    return lines + [f"Note. {note}" for note in diagnosis["notes"]]
