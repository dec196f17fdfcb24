"""What a pilot has found so far, in one JSON file that is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_limits.checks import fail

FILE = "pilot.json"


def resume(out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder's file holds; where there is none, what is asked alone.

    Makes the folder, so that one that cannot be written to is refused before anything is measured.
    Raises ValueError for a file of another pilot, and for one that cannot be read; OSError for a
    folder that cannot be made.
    """
    if out.exists() and not out.is_dir():
        fail("--out", f"{out}, a file", "a folder")
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE
    if not path.exists():
        return {"asked": dict(asked)}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = state["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: got {error!r}, expected a pilot's file") from None
    for name, value in asked.items():
        # JSON knows no tuples.
        if found.get(name) != json.loads(json.dumps(value)):
            got = f"a pilot of {name} {found.get(name)!r}"
            fail(out, got, f"{value!r}, or another --out")
    return state


def save(state: Mapping[str, Any], out: Path) -> Path:
    """Writes the file, under another name until it is whole; returns its path."""
    path = out / FILE
    half = path.with_suffix(".part")
    # Not a number is written as the word NaN, which Python's reader knows.
    half.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(half, path)
    return path
