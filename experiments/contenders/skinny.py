"""Matrix products timed beside the gradients, and what share of their rate a gradient attains.

The polynomial gradient lives on products (k x L) (L x (d + 1)). They are so skinny that no machine
multiplies them at the rate of square ones; what can be asked of the gradient is measured on them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_limits.instruments import timing
from lora_limits.linalg import dot

SQUARE = 2048
SKINNY_LENGTH = 2**18  # beyond it the rate no longer changes, and the features alone take gigabytes


def products(length: int, features: tuple[int, ...], width: int) -> dict[str, Any]:
    """Calls of a square product and, by k, of (k x L) (L x (d + 1)), the product the polynomial
    gradient lives on.
    """
    product = jax.jit(dot)
    square = jnp.ones((SQUARE, SQUARE))
    calls: dict[str, Any] = {"square": lambda: product(square, square)}
    for k in features:
        left = jnp.ones((k, min(length, SKINNY_LENGTH)))
        right = jnp.ones((min(length, SKINNY_LENGTH), width + 1))
        calls[f"skinny {k}"] = lambda x=left, y=right: product(x, y)
    return calls


def rates(
    methods: dict[str, Any], beside: dict[str, dict[str, Any]], length: int, width: int
) -> dict[str, Any]:
    """Ratios to the square product, and the share of the skinny rate that 3 products of L k (d + 1)
    terms come to.

    Three are what a query adapter cannot do without; a value adapter needs more, which is not
    counted. beside: the times of `products`, by turns with the methods'; ratios are round by round.
    """
    out: dict[str, Any] = {
        "square_seconds": beside["square"]["seconds"],
        "skinny_rate": {},
        "attained": {},
        "to_square": {},
    }
    for name, method in methods.items():
        k = method["features"]
        if f"skinny {k}" not in beside or method["family"] != "polynomial":
            continue
        skinny, tokens = beside[f"skinny {k}"], min(length, SKINNY_LENGTH)
        # Two operations a term of one product, for each token.
        out["skinny_rate"][name] = 2.0 * k * (width + 1) * tokens / skinny["seconds"]
        if "seconds" in method["gradient"]:
            own = method["gradient"]
            out["attained"][name] = 3 * length / tokens * timing.ratio(skinny, own)[0]
            out["to_square"][name] = timing.ratio(own, beside["square"])[0]
    return out
