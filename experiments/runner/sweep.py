"""The one sweep: measure every point of a config that has no row yet, and add its row before going
on to the next.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from experiments import Refused
from experiments.runner import store
from experiments.runner.config import Experiment, Fields, Sweep


def plan(
    experiment: Experiment, config: Fields, shard: tuple[int, int] | None = None
) -> dict[str, dict[str, Any]]:
    """The points of a config by their row's key, in order; of a shard (i, n), every n-th of them
    from the i-th on.

    Raises Refused for a config without points. A shard may well be empty.
    """
    fields = config.model_dump(mode="json")
    shared = {name: fields[name] for name in experiment.shared}
    key = functools.partial(store.key, experiment.name, experiment.version, shared)
    points = {key(point): point for point in experiment.points(config)}
    if not points:
        raise Refused(
            f"{experiment.name}: got a config that makes no points, expected at least one"
        )
    first, step = shard or (1, 1)
    return dict(list(points.items())[first - 1 :: step])


def run(
    sweep: Sweep, folder: Path, argv: Sequence[str], *, shard: tuple[int, int] | None, retry: bool
) -> int:
    """Finish a sweep in `folder`, from wherever earlier runs left it. Exit status: 1 if any of its
    points failed.

    With `retry` the points whose row says "failed" are measured again. `argv` goes into the
    manifest.
    Raises Refused as `store.appender` does.
    """
    _set_precision(sweep.experiment.x64)
    planned = plan(sweep.experiment, sweep.config, shard)
    part = "-{}-of-{}".format(*shard) if shard else ""
    path = folder / f"rows{part}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with store.appender(path) as append:
        statuses = {
            row["key"]: row["status"] for row in store.read(folder) if row["key"] in planned
        }
        done = {key for key, status in statuses.items() if not (retry and status == "failed")}
        store.write_manifest(folder / f"manifest{part}.json", _account(sweep, argv))
        with _reporter(len(planned), len(done)) as (begin, end):
            for key, point in planned.items():
                if key not in done:
                    begin(point)
                    row = measure(sweep.experiment, sweep.config, key, point)
                    append(row)
                    end(row)
                    statuses[key] = row["status"]
    failed = sum(status == "failed" for status in statuses.values())
    print(f"results: {path} ({len(statuses) - failed} ok, {failed} failed)", flush=True)
    return 1 if failed else 0


def measure(experiment: Experiment, config: Fields, key: str, point: dict[str, Any]) -> store.Row:
    """The row of one point. An exception, or metrics that are not JSON, makes a row of status
    "failed".
    """
    start = time.perf_counter()
    try:
        metrics = store.encode(experiment.measure(point, config))
        if not isinstance(metrics, dict):
            raise TypeError(f"metrics: got {type(metrics).__name__}, expected a dict")
        json.dumps(metrics, allow_nan=False)
        outcome = {"status": "ok", "metrics": metrics}
    except Exception as error:  # out of memory included: one point must not end the sweep
        outcome = {
            "status": "failed",
            "error": {"type": type(error).__name__, "message": str(error)},
        }
    identity = {
        "key": key,
        "experiment": experiment.name,
        "version": experiment.version,
        "point": point,
    }
    return {**identity, **outcome, "seconds": time.perf_counter() - start}


def _set_precision(x64: bool | None) -> None:
    if x64 is not None:
        # Here, for a sweep of an experiment without jax does not wait for it.
        import jax

        jax.config.update("jax_enable_x64", x64)


def _account(sweep: Sweep, argv: Sequence[str]) -> dict[str, Any]:
    return {
        "experiment": sweep.experiment.name,
        "version": sweep.experiment.version,
        "size": sweep.size,
        "config": sweep.config.model_dump(mode="json"),
        "argv": list(argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **store.surroundings(),
    }


@contextlib.contextmanager
def _reporter(
    total: int, done: int
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[store.Row], None]]]:
    """Two functions to call before and after each point: a bar on a terminal, else a line for each
    finished point.
    """
    if not sys.stdout.isatty():
        yield (lambda point: None), _line_printer(total, done)
        return
    # Here, for a sweep without a terminal does without it.
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}", markup=False)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text) as bar:
        task = bar.add_task("", total=total, completed=done)

        def end(row: store.Row) -> None:
            bar.advance(task)
            if row["status"] == "failed":
                bar.console.print(
                    f"{_label(row['point'])}: {_outcome(row)}", markup=False, highlight=False
                )

        yield (lambda point: bar.update(task, description=_label(point))), end


def _line_printer(total: int, done: int) -> Callable[[store.Row], None]:
    start = time.perf_counter()
    count = itertools.count(1)
    if done:
        print(f"{done} of {total} points are there already", flush=True)

    def end(row: store.Row) -> None:
        here = next(count)
        left = (time.perf_counter() - start) / here * (total - done - here)
        clock = timedelta(seconds=round(left))
        print(
            f"[{done + here}/{total}] {_label(row['point'])}: {_outcome(row)}, {clock} left",
            flush=True,
        )

    return end


def _label(point: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in point.items())


def _outcome(row: store.Row) -> str:
    if row["status"] == "ok":
        return f"ok, {row['seconds']:.3g} s"
    return f"failed, {row['error']['type']}: {row['error']['message'].partition(chr(10))[0]}"
