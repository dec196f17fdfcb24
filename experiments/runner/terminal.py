"""What a long run owes the terminal: it ends at once and in one line when it is told to, and goes on
when nobody reads what it prints.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
GOES_ON = "the same command goes on with what is left"


def take_over() -> None:
    """End on SIGINT and SIGTERM at once, in one line; never end on a stream that nobody reads.

    For programs alone, before they import anything slow: it changes the whole process.
    """
    _end_at_once()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # None where the shell closed it: `>&-`.
        setattr(sys, name, _open_nowhere() if stream is None else Unbroken(stream))


def _end_at_once() -> None:
    """A thread waits for the signal's number, for the main thread may be deep in a computation.

    It ends the process there and then. Rows do not mind: each is one write, and a torn last one is
    dropped when the run goes on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The interpreter's own handler writes the number there, whatever the main thread is doing.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in ENDED:
        # A signal that the shell ignores, as in `nohup ... &`, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


def _wait(reader: int) -> None:
    number = 0
    while number not in ENDED:
        number = os.read(reader, 1)[0]
    with contextlib.suppress(OSError):
        # A progress bar hides the cursor; on a terminal its line is left as well.
        shown = "\x1b[?25h\n" if os.isatty(2) else ""
        os.write(2, f"{shown}{ENDED[signal.Signals(number)]}: {GOES_ON}\n".encode())
    os._exit(128 + number)


def _open_nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


class Unbroken:
    """A stream whose reader may leave, or whose disk may fill: what is said then goes nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str, /) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        # The descriptor too, for what is left in the buffer is flushed as the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
