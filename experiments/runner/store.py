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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import Refused

Row = dict[str, Any]
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
IDENTITY = ("experiment", "version", "fields")


def key(experiment: str, version: int, fields: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over what makes a measurement what it is; `fields`: all that
    it depends on beside the point.
    """
    identity = [experiment, version, fields, point]
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


def read(path: str | Path) -> list[Row]:
    """Every row of every rows*.jsonl in a results folder, or of one such file, metrics decoded, one
    for each key.

    Of several with one key an "ok" comes before a "failed", then the last. A torn last line is
    passed over.
    Raises Refused for any other line that is not a row, and for a path that is not there.
    """
    path = Path(path)
    if not path.exists():
        raise Refused(f"{path}: got no such folder, expected one with rows*.jsonl in it")
    latest: dict[str, Row] = {}
    for part in sorted(path.glob("rows*.jsonl")) if path.is_dir() else [path]:
        for row in _sound_rows(part)[0]:
            held = latest.get(row["key"])
            # A failure never follows a success in one file; across files, no order in time is
            # known.
            if held is None or held["status"] == "failed" or row["status"] == "ok":
                latest[row["key"]] = row
    return list(latest.values())


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
            with names(path):
                # One unbuffered write: a kill leaves all of the line or a torn last one, never a
                # hole in the middle.
                written = file.write(line)
                if written != len(line):
                    raise OSError(0, f"wrote {written} bytes of a row's {len(line)}; disk full?")
                os.fsync(file.fileno())

        yield append


@contextlib.contextmanager
def names(path: Path) -> Iterator[None]:
    """Has an OSError that names no file, as writing and syncing raise it, name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _read_row(line: str) -> Any:
    """What a line holds, its metrics decoded."""
    row = json.loads(line)
    # To look for such numbers takes longer than to read the line, and most lines hold none.
    if any(f'"{name}"' in line for name in NOT_FINITE) and isinstance(row, dict):
        return row | {"metrics": decode(row["metrics"])} if "metrics" in row else row
    return row


def _sound_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of one file, metrics decoded, and how many bytes they take: all of it, less a torn last
    line.
    """
    data = path.read_bytes()
    *lines, tail = data.split(b"\n")
    sound = len(data) - len(tail)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            # An editor may have put a byte order mark before the first.
            row = _read_row(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError:
            if number == len(lines) and not tail:
                return rows, sound - len(line) - 1
            row = None
        if not _is_row(row):
            start = line[:40].decode(errors="replace")
            raise Refused(f"{path}:{number}: got {start!r}, expected a row of a sweep")
        rows.append(row)
    return rows, sound


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("key"), str)
        and isinstance(row.get("point"), dict)
        and (
            (row.get("status") == "ok" and isinstance(row.get("metrics"), dict))
            or (row.get("status") == "failed" and isinstance(row.get("error"), dict))
        )
    )


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a results folder, those of its shards in their order.

    Raises Refused for a file that is not a manifest.
    """
    return [read_manifest(path) for path in sorted(folder.glob("manifest*.json"))]


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest. Raises Refused where the file is none."""
    told: Any = None
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
        sound = isinstance(told["experiment"], str) and isinstance(told["config"], dict)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise Refused(f"{path}: got a file that is not a manifest, expected one or none")
    return told


def write_manifest(path: Path, run: Mapping[str, Any]) -> None:
    """Put a run's account in place of the one before, which joins the list under "runs", oldest
    first, without its plan; all or nothing.

    Raises Refused where the file there is not a manifest.
    """
    earlier: list[Any] = []
    if path.exists():
        before = read_manifest(path)
        before.pop("planned", None)
        earlier = [*before.pop("runs", []), before]
    replace({path: json.dumps({**run, "runs": earlier}, indent=1, allow_nan=False) + "\n"})


def replace(texts: Mapping[Path, str]) -> None:
    """Put texts in place of files, all or nothing: beside them first, and in their places once all
    are written.
    """
    partials = {path: path.with_name(path.name + ".partial") for path in texts}
    try:
        for path, text in texts.items():
            with names(path), open(partials[path], "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            os.replace(partial, path)
    except OSError:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink()
        raise
