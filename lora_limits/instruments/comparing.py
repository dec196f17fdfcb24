"""Gradients held against one another: arrays by name, relative errors; and a plain softmax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_limits.checks import fail


def named(gradient: Mapping[str, Any], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """{"query.a": array, ...} of a {name: Adapter} in NumPy; dtype None leaves each its own."""
    out = {}
    for name, adapter in gradient.items():
        out[f"{name}.a"] = np.asarray(adapter.a, dtype)
        out[f"{name}.b"] = np.asarray(adapter.b, dtype)
    return out


def frobenius_error(got: Any, want: Any) -> float:
    """|| got - want ||_F / || want ||_F, in the precision of the arrays.

    Of zeros wanted: 0 if zeros were got and inf if not.
    """
    # NaN in either comes out as NaN, which no limit accepts
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
        fail("shape", got.shape, want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())


def certified_share(result: Any) -> float:
    """What a GradientResult certifies: the largest bound of an array over its largest entry."""
    pairs = zip(
        named(result.bound).values(),
        named(result.gradient).values(),
        strict=True,
    )
    return max(float(bound / np.abs(x).max()) for bound, x in pairs)


def softmax(scores: Float[np.ndarray, "*rows l"]) -> Float[np.ndarray, "*rows l"]:
    """exp(S) with each row divided by its sum, in NumPy."""
    # The largest of each row becomes exp(0): nothing overflows.
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
