"""Rotary positions: pairs of coordinates of queries and keys turned by angles that grow by token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def angles(length: int, width: int, base: float, dtype: Any) -> Float[Array, "length half"]:
    """t base^(-2 i / width) in radians, for tokens t = 0, 1, ... and pairs i of coordinates.

    In single precision angles of thousands are good to about 2e-4, as they are in transformers.
    """
    frequencies = jnp.asarray(base ** (-np.arange(0, width, 2) / width), dtype)
    return jnp.arange(length).astype(dtype)[:, None] * frequencies[None]


def turn(x: Float[Array, "b l heads width"], base: float) -> Float[Array, "b l heads width"]:
    """Rows turned by their positions, so that scores depend on distances. In the dtype of x.

    Coordinates i and j = i + width / 2 are a pair, as in weights of Llama kinds in Hugging Face's
    layout: (x_i cos - x_j sin, x_j cos + x_i sin).
    """
    # Half precision knows no angles of thousands.
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    at = angles(x.shape[1], x.shape[-1], base, dtype)[None, :, None]
    cos = jnp.cos(at).astype(x.dtype)
    sin = jnp.sin(at).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
