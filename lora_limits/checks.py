"""Refusals, written once: "what: got ..., expected ...", always a ValueError in one line."""

from __future__ import annotations

from typing import Any, NoReturn


def fail(what: Any, got: Any, expected: Any) -> NoReturn:
    """Raises the ValueError that names what was got and what was expected."""
    raise ValueError(f"{what}: got {got}, expected {expected}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        fail(name, repr(value), f"an integer of at least {least}")
