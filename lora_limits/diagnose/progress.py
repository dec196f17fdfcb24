"""What a diagnosis is doing, from its first second: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

EVERY = 15.0  # seconds between two lines where there is no terminal


class Progress:
    """Stages, one after another, each of a number of steps, told on stderr.

    On a terminal a bar with the time left, gone in the end; elsewhere a line where a stage begins,
    and one every EVERY seconds.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._stage, self._total, self._done = "", 1, 0
        self._began = self._told = time.monotonic()

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
        self._began = self._told = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total)
        elif not self._quiet:
            print(f"{name} ...", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One step of the stage is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1)
        elif not self._quiet and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            each = (self._told - self._began) / self._done
            left = each * (self._total - self._done)
            said = f"{self._stage}: {self._done} of {self._total}, about {left / 60:.0f} min left"
            print(said, file=sys.stderr, flush=True)
