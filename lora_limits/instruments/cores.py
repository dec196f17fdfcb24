"""How many cores a measurement had."""

from __future__ import annotations

import os


def usable() -> int | None:
    """The cores that this process may use, where the system tells; else those that there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()
