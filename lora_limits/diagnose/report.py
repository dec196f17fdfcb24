"""A diagnosis as JSON, as a table on the terminal, and in sentences."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lora_limits.diagnose.advice import basis
from lora_limits.diagnose.summary import notes

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
    if row["verdict"] == "now":
        return "pays now"
    known = "" if basis(row) != "extrapolated" else ", extrapolated"
    return f"from {row['pays_from']:,}{known}"


def cells(row: dict[str, Any], tolerance: float) -> list[str]:
    """A row of the table, empty where a head was refused before it was known."""
    head = [f"{row['layer']}.{row['head']}"]
    if "norms" not in row:
        return [*head, *[""] * 6, verdict(row, tolerance)]
    adapted = row["norms"]["adapted"]
    head += [f"{adapted['gamma_ratio_centred']:.2f}", f"{adapted['score_ratio']:.2f}"]
    if row["refused"]:
        return [*head, *[""] * 4, verdict(row, tolerance)]
    # None is how JSON holds an infinite error.
    error = math.inf if row["error"] is None else row["error"]
    worst = f"{error:.2g}" if error < 1e3 else "> 1000"
    noise = "" if row["noise"] is None else f"{row['noise']:.0%}"
    speed = f"{row['seconds']['exact'] / row['seconds']['method']:.2g}"
    return [*head, row["method"], worst, speed, noise, verdict(row, tolerance)]


COLUMNS = ("head", "Γ/√ln L", "R/ln L", "method", "error", "speed", "noise", "verdict")


def table(diagnosis: dict[str, Any]) -> Any:
    """A rich table, one row a head, readable at 80 columns."""
    from rich import box
    from rich.table import Table

    far = any(not row["refused"] and basis(row) == "extrapolated" for row in diagnosis["heads"])
    look = {"pad_edge": False, "padding": (0, 1, 0, 0), "caption_justify": "left"}
    out = Table(box=box.SIMPLE_HEAD, caption="* extrapolated" if far else None, **look)
    for name in COLUMNS:
        left = name in ("method", "verdict")
        side = "left" if left else "right"
        out.add_column(name, justify=side, no_wrap=name != "verdict", overflow="fold")
    for row in diagnosis["heads"]:
        head, *numbers, method, error, speed, noise, said = cells(row, diagnosis["tolerance"])
        method = method.replace("SparseLowRank", "Sparse").replace(", ", ",")
        # a star, so that a head stays on its line
        said = said.replace(", extrapolated", "*")
        out.add_row(head, *numbers, method, error, speed, noise, said)
    return out


def words(diagnosis: dict[str, Any]) -> list[str]:
    """The diagnosis in sentences: counts, the three dials, and how it was made."""
    rows = diagnosis["heads"]
    verdicts = [row.get("verdict") for row in rows if not row["refused"]]
    now, later, never = (verdicts.count(name) for name in ("now", "later", "never"))
    refused = sum(bool(row["refused"]) for row in rows)
    lines = [
        f"Of {len(rows)} heads, {now} pay now, {later} at longer lengths, {never} never "
        f"at {diagnosis['tolerance']:.0%} error with the methods tried, and {refused} are refused."
    ]
    names = {"norm": "Norm bound", "rank": "LoRA rank", "batch": "Mini-batch"}
    lines += [f"{names[name]}. {dial['text']}" for name, dial in diagnosis["dials"].items()]
    return lines + [f"Note. {note}" for note in notes(diagnosis)]
