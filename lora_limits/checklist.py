"""The checklist that leads from a norm to a decision: one page, for print and for terminals."""

from __future__ import annotations

from importlib.resources import files


def text() -> str:
    """The page, in Markdown of 80 columns."""
    return files("lora_limits").joinpath("checklist.md").read_text(encoding="utf-8")
