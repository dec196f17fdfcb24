"""The one sweep: measure every point of a config that has no row yet, and add its row before going
on to the next.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments import Refused
from experiments.runner import machine, results, store, telling
from experiments.runner.note import Sweep


def plan(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """The points of a config by their row's key, in order.

    Raises Refused for a config without points.
    """
    own = sweep.identity()
    key = functools.partial(store.key, own["experiment"], own["version"], own["fields"])
    points = {key(point): point for point in sweep.experiment.points(sweep.config)}
    if not points:
        raise Refused(
            f"{sweep.experiment.name}: got a config that makes no points, expected at least one"
        )
    return points


def run(
    sweep: Sweep, folder: Path, argv: Sequence[str], *, shard: tuple[int, int] | None, retry: bool
) -> list[store.Row]:
    """Finish a sweep in `folder`, from wherever earlier runs left it; the rows of its points that
    failed.

    Of a shard (i, n), every n-th point from the i-th on; there may be none. With `retry` the points
    whose row says "failed" are measured again. `argv` goes into the manifest.
    Raises Refused for a folder that holds results of another plan, and as `store.appender` does.
    """
    _set_precision(sweep.experiment.x64)
    planned = plan(sweep)
    first, step = shard or (1, 1)
    mine = dict(list(planned.items())[first - 1 :: step])
    part = "-{}-of-{}".format(*shard) if shard else ""
    path = folder / f"rows{part}.jsonl"
    _check_folder(sweep, folder, argv)
    with store.names(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with store.appender(path) as append:
        rows = {row["key"]: row for row in store.read(folder) if row["key"] in mine}
        account = _account(sweep, planned, argv)
        store.write_manifest(folder / f"manifest{part}.json", account)
        telling.dirty(account)
        done = {k for k, row in rows.items() if not (retry and row["status"] == "failed")}
        with telling.reporter(len(mine), len(done)) as (begin, end):
            for key, point in mine.items():
                if key not in done:
                    begin(point)
                    row = measure(sweep, key, point) | {"run": account["run"]}
                    append(row)
                    end(row)
                    rows[key] = row
                    _make_room()
    failed = [row for row in rows.values() if row["status"] == "failed"]
    telling.say(f"results: {path} ({len(rows) - len(failed)} ok, {len(failed)} failed)")
    return failed


def _make_room() -> None:
    """A sweep may compile programs by the thousand, none of them wanted again."""
    # What imports no JAX compiles nothing, and does not wait for it.
    if "jax" in sys.modules:
        from lora_limits.instruments import compiling

        compiling.make_room()


def measure(sweep: Sweep, key: str, point: dict[str, Any]) -> store.Row:
    """The row of one point. An exception, or metrics that are not JSON, makes a row of status
    "failed".

    Raises Refused where `measure` reads a field that only makes points.
    """
    start = time.perf_counter()
    try:
        config = sweep.experiment.measured(sweep.config)
        metrics = store.encode(sweep.experiment.measure(point, config))
        if not isinstance(metrics, dict):
            raise TypeError(f"metrics: got {type(metrics).__name__}, expected a dict")
        json.dumps(metrics, allow_nan=False)
        outcome = {"status": "ok", "metrics": metrics}
    except Refused:
        raise
    except Exception as error:  # out of memory included: one point must not end the sweep
        outcome = {
            "status": "failed",
            "error": {"type": type(error).__name__, "message": str(error)},
        }
    seconds = time.perf_counter() - start
    return {"key": key, **sweep.identity(), "point": point, **outcome, "seconds": seconds}


def _check_folder(sweep: Sweep, folder: Path, argv: Sequence[str]) -> None:
    """Raises Refused where the folder holds results of another plan, with the command that would
    work.
    """
    if not folder.is_dir():
        return
    own = sweep.identity()
    for told in [*store.read_manifests(folder), *store.read(folder)]:
        theirs = results.identity(told)
        if theirs != own:
            got, expected = results.differences(theirs, own)
            command = telling.elsewhere(argv, folder, theirs, own)
            raise Refused(f"{folder}: got results {got}, expected {expected}; try: {command}")


def _set_precision(x64: bool | None) -> None:
    """Set jax's precision, and start it. Raises Refused where the platform asked for is not there."""
    if x64 is None:
        return
    # Here, for a sweep of an experiment without jax does not wait for it.
    import jax

    jax.config.update("jax_enable_x64", x64)
    try:
        jax.devices()
    except Exception as error:  # an AssertionError without a word, among others
        asked = os.environ.get("JAX_PLATFORMS")
        why = str(error).partition("\n")[0] or type(error).__name__
        raise Refused(f"JAX_PLATFORMS: got {asked!r}, expected a platform here ({why})") from None


def _account(
    sweep: Sweep, planned: dict[str, dict[str, Any]], argv: Sequence[str]
) -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "name": sweep.name,
        **sweep.identity(),
        "size": sweep.size,
        "config": sweep.config.model_dump(mode="json"),
        # Rows say which run measured them; two may have begun in the same second.
        "run": f"{started}-{os.urandom(2).hex()}",
        "argv": list(argv),
        "started": started,
        **machine.surroundings(),
        "planned": planned,
    }
