"""What the runner says: the lab note first, every point as it begins and ends, what failed last."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from experiments.runner import note
from experiments.runner.config import SIZES, describe
from experiments.runner.note import Note
from experiments.runner.store import Row

Point = dict[str, Any]


def say(text: str) -> None:
    """A line, at once: whoever looks at a log sees how far the sweep is."""
    print(text, flush=True)


def _paragraph(text: str, first: str = "", rest: str = "  ") -> str:
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    told = " ".join(text.split())
    return textwrap.fill(told, width, initial_indent=first, subsequent_indent=rest)


def header(name: str, told: Note, size: str) -> None:
    """Claim, expected outcome and minutes of a config."""
    minutes = getattr(told.minutes, size) if told.minutes else None
    long = f"about {minutes:g} min on two idle cores" if minutes else "minutes not said"
    say(f"{name}, {size} size: {long}")
    say(_paragraph(told.claim or "none", "claim: "))
    say(_paragraph(told.expect or "nothing said", "expect: "))


def configs() -> None:
    """Every config there is: name, minutes by size, claim."""
    say(f"{'config':<28}{'minutes: ' + ', '.join(SIZES)}")
    for path in sorted(note.CONFIGS.glob("*.toml")):
        told = note.read(path)
        each = [f"{getattr(told.minutes, size):g}" for size in SIZES] if told.minutes else ["?"]
        say(f"\n{path.parent.name + '/' + path.name:<28}{', '.join(each)}")
        say(_paragraph(told.claim, "  "))


def fields(sweep: note.Sweep) -> None:
    """Every field of a config's experiment: its flag, what it takes, its value at this size."""
    own = sweep.experiment
    say(f"\nfields of {own.name}, version {own.version}, at {sweep.size} size:")
    for part in (own.fields.__doc__ or "").split("\n\n"):
        say(_paragraph(part, "  "))
    values = sweep.config.model_dump(mode="json")
    for name, field in own.fields.model_fields.items():
        role = " (only makes points)" if name in own.point_fields else ""
        role = " (where files lie)" if name in own.places else role
        say(f"\n  --{name.replace('_', '-')}  {describe(field.annotation)}{role}")
        say(f"      {values[name]}")


def dirty(account: dict[str, Any]) -> None:
    """Says it where a run's rows cannot be traced to a commit."""
    if account["commit"] is None:
        say("note: no commit is known: these rows cannot be kept")
    elif account["dirty"]:
        told = f"the working tree differs from commit {account['commit'][:8]}"
        say(f"note: {told}: these rows cannot be kept")


def elsewhere(argv: Sequence[str], folder: Path, theirs: Point, own: Point) -> str:
    """The command that does what `argv` asks for in a folder of its own, named by what differs."""
    suffix = f"v{own['version']}"
    fields = own["fields"]
    if theirs.get("experiment") != own["experiment"]:
        suffix = own["experiment"].rpartition(".")[2]
    elif theirs.get("version") == own["version"] and "fields" in theirs:
        # A field may be on one side alone, where an experiment changed and its version did not.
        every = fields | theirs["fields"]
        name = next(n for n in every if theirs["fields"].get(n) != fields.get(n))
        value = "".join(c if c.isalnum() or c in ".-" else "-" for c in str(fields.get(name)))
        suffix = f"{name.replace('_', '-')}-{value.strip('-')[:24]}"
    return command(_less(argv, "--out"), "--out", f"{folder}-{suffix}")


def the_rest(argv: Sequence[str], folder: Path, *, retry: bool) -> str:
    """The command for all that is left of the sweep in a folder, of which one shard had a part, and
    which may lie elsewhere now.
    """
    again = ["--retry"] if retry and "--retry" not in argv else []
    return command(_less(_less(argv, "--shard"), "--out"), "--out", str(folder), *again)


def _less(argv: Sequence[str], flag: str) -> list[str]:
    """A command line without one of the flags that take a word."""
    words = list(argv)
    for place, word in enumerate(argv):
        if word == flag:
            words[place : place + 2] = []
        elif word.startswith(f"{flag}="):
            words[place : place + 1] = []
    return words


def command(argv: Sequence[str], *more: str) -> str:
    """A command line of the runner that can be pasted into a shell."""
    return "python -m experiments " + shlex.join([*argv, *more])


def failures(name: str, failed: Sequence[Row], argv: Sequence[str]) -> None:
    """What failed, and the command that measures it again."""
    if not failed:
        return
    say(f"\n{name}: {len(failed)} point{'s' * (len(failed) > 1)} failed")
    for row in failed[:20]:
        say(f"  {label(row['point'])}: {_outcome(row)}")
    if len(failed) > 20:
        say(f"  and {len(failed) - 20} more")
    again = [] if "--retry" in argv else ["--retry"]
    say(f"measure them again: {command(argv, *again)}")


@contextlib.contextmanager
def reporter(
    total: int, done: int
) -> Iterator[tuple[Callable[[Point], None], Callable[[Row], None]]]:
    """Two functions to call before and after each point: a bar on a terminal, else a line for each
    point, written as far as it is known.
    """
    say(f"{done} of {total} points are there already" if done else f"{total} points")
    if not sys.stdout.isatty():
        yield _printers(total, done)
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

        def end(row: Row) -> None:
            bar.advance(task)
            if row["status"] == "failed":
                bar.console.print(
                    f"{label(row['point'])}: {_outcome(row)}", markup=False, highlight=False
                )

        yield (lambda point: bar.update(task, description=label(point))), end


def _printers(total: int, done: int) -> tuple[Callable[[Point], None], Callable[[Row], None]]:
    start = time.perf_counter()
    begun, ended = itertools.count(done + 1), itertools.count(1)

    def begin(point: Point) -> None:
        print(f"[{next(begun)}/{total}] {label(point)}: ", end="", flush=True)

    def end(row: Row) -> None:
        here = next(ended)
        left = (time.perf_counter() - start) / here * (total - done - here)
        say(f"{_outcome(row)}, {timedelta(seconds=round(left))} left")

    return begin, end


def label(point: Point) -> str:
    """The coordinates of a point, in one line."""
    return " ".join(f"{name}={value}" for name, value in point.items())


def _outcome(row: Row) -> str:
    if row["status"] == "ok":
        return f"ok, {row['seconds']:.3g} s"
    return f"failed, {row['error']['type']}: {row['error']['message'].partition(chr(10))[0]}"
