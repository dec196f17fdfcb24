"""What `lora-limits diagnose` says of all-MiniLM-L6-v2: where approximate gradients would pay, and
three dials.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lora_limits.diagnose import picture
from paper_figures.drawing import style

CONFIG = "diagnose"
COMMAND = (
    "lora-limits diagnose MODEL_DIR --text FILE --out DIR, "
    "its diagnosis.json kept there as diagnose.json"
)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The picture that the command itself draws. rows: one, the diagnosis."""
    style.defaults(picture.RC)
    fig = plt.figure(figsize=(picture.WIDTH, picture.HEIGHT))
    picture.fill(fig, rows[0])
    return fig
