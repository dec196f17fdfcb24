"""What `lora-limits diagnose` says of SmolLM2-135M, a decoder: where approximate gradients would pay,
on the gradient of its own loss, and three dials.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paper_figures.drawing import diagnosis

CONFIG = "diagnose_decoder"
COMMAND = diagnosis.command(CONFIG)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The picture that the command itself draws, of five of its layers. rows: one, the diagnosis."""
    return diagnosis.drawn(rows)
