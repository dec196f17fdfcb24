"""Refusals, written once: "what: got ..., expected ...", always a ValueError in one line."""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

import numpy as np


def fail(what: Any, got: Any, expected: Any) -> NoReturn:
    """Raises the ValueError that names what was got and what was expected."""
    raise ValueError(f"{what}: got {got}, expected {expected}")


def check_integer(name: str, value: Any, least: int) -> int:
    """The value as Python's int, whichever library's integer it is.

    Raises ValueError unless it is an integer, known while tracing, of at least `least`.
    """
    try:
        # True is an integer to Python, and a slip to everybody else.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        fail(name, repr(value), f"an integer of at least {least}")
    return number


def set_integers(owner: Any, **least: int) -> None:
    """Makes Python's ints of the named fields of a frozen dataclass.

    Raises ValueError, with the class and the field in it, for what `check_integer` refuses.
    """
    for name, smallest in least.items():
        number = check_integer(f"{type(owner).__name__} {name}", getattr(owner, name), smallest)
        object.__setattr__(owner, name, number)


def check_number(name: str, value: Any, expected: str = "a finite number") -> float:
    """The value as Python's float, whichever library's real scalar it is.

    Raises ValueError unless it is a finite number, known while tracing; True and "1" are none.
    """
    no_number = isinstance(value, str | bytes | bool | np.bool_)
    try:
        number = math.nan if no_number or np.ndim(value) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        fail(name, repr(value), expected)
    return number
