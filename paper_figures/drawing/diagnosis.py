"""The picture of a diagnosis, as `lora-limits diagnose` draws it itself."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lora_limits.diagnose import picture
from paper_figures.drawing import style


def command(config: str) -> str:
    """What makes the kept results of a figure."""
    made = "lora-limits diagnose MODEL_DIR --text FILE --out DIR, "
    return f"{made}its diagnosis.json kept there as {config}.json"


def drawn(rows: list[dict[str, Any]]) -> Figure:
    """rows: one, the diagnosis."""
    style.defaults(picture.RC)
    fig = plt.figure(figsize=(picture.WIDTH, picture.HEIGHT))
    picture.fill(fig, rows[0])
    return fig
