"""What a sweep leaves in its folder: rows*.jsonl, one line per point and only ever added to, and
manifest*.json.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments import Refused

Row = dict[str, Any]
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def key(experiment: str, version: int, shared: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over what makes a measurement what it is; `shared`: the
    fields behind it.
    """
    identity = [experiment, version, shared, point]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode(value: Any) -> Any:
    """The value with its NaN and infinite floats, which JSON lacks, as "nan", "inf" and "-inf", at
    any depth.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return _inside(encode, value)


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    return _inside(decode, value)


def _inside(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: change(item) for name, item in value.items()}
    return [change(item) for item in value] if isinstance(value, list | tuple) else value


def read(folder: str | Path) -> list[Row]:
    """Every row of every rows*.jsonl in a results folder, metrics decoded, one for each key.

    Of several with one key an "ok" comes before a "failed", then the last. A torn last line is
    passed over.
    Raises Refused for any other line that is not a row, and for a folder that is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused(f"{folder}: got no such folder, expected one with rows*.jsonl in it")
    latest: dict[str, Row] = {}
    for path in sorted(folder.glob("rows*.jsonl")):
        for row in _sound_rows(path)[0]:
            held = latest.get(row["key"])
            # A failure never follows a success in one file; across files, no order in time is
            # known.
            if held is None or held["status"] == "failed" or row["status"] == "ok":
                latest[row["key"]] = row
    return [
        row | {"metrics": decode(row["metrics"])} if "metrics" in row else row
        for row in latest.values()
    ]


@contextlib.contextmanager
def appender(path: Path) -> Iterator[Callable[[Row], None]]:
    """Hold a rows file for writing, cut a torn last line off, and yield the function that adds a
    row for good.

    Raises Refused where another process holds the file, and for a bad line that is not the last.
    """
    with open(path, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"{path}: got a file that another process is writing, expected one that is free"
            ) from None
        file.truncate(_sound_rows(path)[1])

        def append(row: Row) -> None:
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
            # One unbuffered write: a kill leaves all of the line or a torn last one, never a hole
            # in the middle.
            written = file.write(line)
            if written != len(line):
                raise OSError(
                    f"{path}: wrote {written} bytes of a row's {len(line)}; is the disk full?"
                )
            os.fsync(file.fileno())

        yield append


def _sound_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of one file and how many bytes they take: all of it, less a torn last line."""
    data = path.read_bytes()
    *lines, tail = data.split(b"\n")
    sound = len(data) - len(tail)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
        except ValueError:
            if number == len(lines) and not tail:
                return rows, sound - len(line) - 1
            row = None
        if not (
            isinstance(row, dict)
            and isinstance(row.get("key"), str)
            and row.get("status") in ("ok", "failed")
        ):
            start = line[:40].decode(errors="replace")
            raise Refused(f"{path}:{number}: got {start!r}, expected a row with a key and a status")
        rows.append(row)
    return rows, sound


def write_manifest(path: Path, run: Mapping[str, Any]) -> None:
    """Put a run's account in place of the one before, which joins the list under "runs", oldest
    first; all or nothing.

    Raises Refused where the file there is not a manifest.
    """
    earlier: list[Any] = []
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("runs"), before]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise Refused(
                f"{path}: got a file that is not a manifest, expected one or none"
            ) from None
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({**run, "runs": earlier}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def surroundings() -> dict[str, Any]:
    """The code and the machine behind a run: commit, whether anything differs from it, versions,
    device.

    The commit and `dirty` are None outside git; the device and x64 are None in a process that has
    not imported jax.
    """
    commit, dirty = _git()
    jax = sys.modules.get("jax")
    device = jax and jax.devices()[0]
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("jax", "jaxlib", "numpy", "lora_limits")},
        "device": device and {"platform": device.platform, "kind": device.device_kind},
        "cpus": os.cpu_count(),
        "x64": bool(jax.config.jax_enable_x64) if jax else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """The commit, None before the first, and whether the working tree differs from it; untracked
    files count.
    """
    # Without optional locks: a run that starts must not get in the way of a commit being made.
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None
    lines = done.stdout.splitlines()
    commit = next(
        (line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)"
    )
    return None if commit == "(initial)" else commit, any(
        not line.startswith("# ") for line in lines
    )
