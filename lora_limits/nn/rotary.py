"""Rotary positions of a layer: the rows of every head turned by their places (lora_limits/rotary.py)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_limits.rotary import rotary_angles, rotate


@functools.lru_cache(maxsize=16)
def _angles(length: int, width: int, base: float, dtype: Any) -> Float[np.ndarray, "length half"]:
    """One array for all layers, so that a program holds it once."""
    angles = rotary_angles(length, width, base=base, dtype=dtype)
    angles.setflags(write=False)
    return angles


def turn(x: Float[Array, "b l heads width"], base: float) -> Float[Array, "b l heads width"]:
    """Rows turned by their positions 0, 1, ..., so that scores depend on distances.

    In the dtype of x, but in single precision at least: half precision knows no angles of thousands.
    """
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.dtype(jnp.float32)
    angles = _angles(x.shape[1], x.shape[-1], base, dtype)
    by_head = jax.vmap(rotate, in_axes=(1, None), out_axes=1)
    turned = jax.vmap(by_head, in_axes=(0, None))(x.astype(dtype), angles)
    return turned.astype(x.dtype)
