"""Gradients held against one another: arrays by name, relative errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def named(gradient: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{"query.a": array, ...} in float64."""
    return {
        f"{n}.{h}": np.asarray(getattr(x, h), np.float64)
        for n, x in gradient.items()
        for h in ("a", "b")
    }
