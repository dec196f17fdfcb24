"""What `lora-limits diagnose` says of all-MiniLM-L6-v2: where approximate gradients would pay, and
three dials.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paper_figures.drawing import diagnosis

CONFIG = "diagnose"
COMMAND = diagnosis.command(CONFIG)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The picture that the command itself draws. rows: one, the diagnosis."""
    return diagnosis.drawn(rows)
