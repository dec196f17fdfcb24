"""What a command is doing, from its first second: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

EVERY = 15.0  # seconds between two lines where there is no terminal


class Progress:
    """Stages, one after another, each of a number of steps, told on stderr.

    On a terminal a bar with the time left, gone in the end; elsewhere a line where a stage or its
    first step begins, and one every EVERY seconds. quiet: nothing is told.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._stage, self._total, self._done = "", 1, 0
        self._first: tuple[float, int] | None = None  # (time, steps done) at the first step told
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int = 1) -> None:
        """A new stage begins."""
        self._stage, self._total, self._done = name, total, 0
        self._first = None
        if self._bar is None:
            self._print(f"{name} ...")
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total)

    def step(self) -> None:
        """One more step of the stage is done."""
        self.at(self._done + 1, self._total, self._stage)

    def at(self, done: int, total: int, said: str) -> None:
        """So many steps of the stage are done, and what is going on in it."""
        self._done = done
        now = time.monotonic()
        # What comes before the first step is read and compiled once: no measure of the others.
        if self._first is None and done:
            self._first = now, done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=said)
        elif not done or now - self._told >= EVERY:
            self._print(f"{said} ({done} of {total}{self._left(now, done, total)})")

    def _left(self, now: float, done: int, total: int) -> str:
        """Minutes that are left at the pace since the first step, once there was another."""
        start, before = self._first or (now, done)
        if done == before:
            return ""
        each = (now - start) / (done - before)
        return f", about {each * (total - done) / 60:.0f} min left"

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._told = time.monotonic()
            print(line, file=sys.stderr, flush=True)
