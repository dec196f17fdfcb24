"""Command lines: one line for whatever is refused, naming what was got and what was expected."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

Kind = TypeVar("Kind")
CHOICE = re.compile(r"invalid choice: (.+) \(choose from (.+)\)")


class Parser(argparse.ArgumentParser):
    """argparse's, without its usage before an error; subcommands are made of it too."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one line on stderr."""
        said = CHOICE.sub(r"got \1, expected one of \2", message.removeprefix("argument "))
        self.exit(2, f"error: {' '.join(said.split())} ({self.prog} --help says more)\n")


def integer(text: str) -> int:
    """An argument's type. Raises ArgumentTypeError for what is none."""
    return _read(int, text, "an integer")


def number(text: str) -> float:
    """An argument's type. Raises ArgumentTypeError for what is none; nan and inf are left to who
    asked.
    """
    return _read(float, text, "a number")


def _read(kind: Callable[[str], Kind], text: str, expected: str) -> Kind:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}") from None
