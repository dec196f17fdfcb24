"""Gradients held against one another: arrays by name, relative errors; and the softmax they stand
on, plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def named(gradient: Mapping[str, Any], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """{"query.a": array, ...} of a {name: Adapter} in NumPy; dtype None leaves each its own."""
    return {
        f"{name}.{half}": np.asarray(getattr(adapter, half), dtype)
        for name, adapter in gradient.items()
        for half in ("a", "b")
    }


def frobenius_error(got: Any, want: Any) -> float:
    """|| got - want ||_F / || want ||_F, in the precision of the arrays.

    Of zeros wanted: 0 if zeros were got and inf if not.
    """
    gap = np.linalg.norm(got - want)
    size = np.linalg.norm(want)
    if size > 0:
        return float(gap / size)
    return 0.0 if gap == 0 else math.inf


def max_error(got: Any, want: Any) -> float:
    """max |got - want| / max |want|. Raises ValueError for unequal shapes."""
    got = np.asarray(got)
    want = np.asarray(want)
    if got.shape != want.shape:
        raise ValueError(f"shape: got {got.shape}, expected {want.shape}")
    return float(np.abs(got - want).max() / np.abs(want).max())


def softmax(scores: np.ndarray) -> np.ndarray:
    """exp(S) with each row divided by its sum, in NumPy: (..., L)."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
