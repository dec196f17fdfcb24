"""How far a pilot is and how long it will take: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 15.0  # seconds between lines where there is no terminal


class Telling:
    """Used as `with Telling() as tell: tell(done, total, said)`; writes to stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.is_terminal = sys.stderr.isatty()
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, transient=True, disable=not self.is_terminal)
        self.task = self.bar.add_task("reading", total=None)
        self.began: tuple[float, int] | None = None
        self.spoke = -EVERY

    def __enter__(self) -> Telling:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, said: str) -> None:
        """Steps done, of how many, and what is going on."""
        self.bar.update(self.task, completed=done, total=total, description=said)
        now = time.monotonic()
        # From the first step on: what comes before it is read and compiled once.
        if self.began is None and done:
            self.began = now, done
        if not self.is_terminal and now - self.spoke >= EVERY:
            self.spoke = now
            about = f", about {self._left(now, done, total):.0f} min left" if done else ""
            print(f"{done} of {total} steps: {said}{about}", file=sys.stderr, flush=True)

    def _left(self, now: float, done: int, total: int) -> float:
        """Minutes that are left at the pace so far."""
        start, before = self.began or (now, done)
        return (now - start) / max(done - before, 1) * (total - done) / 60
