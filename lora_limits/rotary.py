"""Rotary positions: pairs of coordinates of queries and keys, turned by angles that grow with the
position (Su et al., arXiv 2104.09864).

With R_i the rotation of position i, the score of query i and key j is
<R_i q_i, R_j k_j> = <q_i, R_{j-i} k_j>. A rotation keeps the length of a row; its largest entry may
grow by sqrt(2), as two entries of 1 make one of sqrt(2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_limits.checks import check_integer, check_number, fail
from lora_limits.linalg import AnyArray


class Rotations(NamedTuple):
    """The angles of a problem. Of n angles a token, angle m turns coordinates m and n + m, as Llama
    has it; coordinates from 2 n on stay as they are, as in models with partial rotary positions.
    Models that turn neighbours (GPT-J) fit once the columns of their weights are permuted.
    """

    query: Any  # (Lq, n)
    key: Any  # (Lk, n)


def rotary_angles(
    positions: int | AnyArray, width: int, *, base: float = 10_000.0, dtype: Any = None
) -> Float[np.ndarray, "n half_width"]:
    """The angles p base^(-2 m / width), m = 0 .. width / 2 - 1, of every position p.

    positions: how many there are, counted from 0, or a vector of them. width: how many coordinates
    are turned, those of a head or fewer. Computed in double precision and taken modulo 2 pi, so
    that far positions lose nothing to rounding. dtype: that of the problem; the session's if None.
    Raises ValueError for a width that is not even, a base not above 0, positions in no vector.
    """
    if check_integer("width", width, 2) % 2:
        fail("width", width, "an even number of coordinates")
    if not check_number("base", base) > 0:
        fail("base", base, "a number above 0")
    if np.ndim(positions) == 0:
        positions = np.arange(check_integer("positions", positions, 1))
    at = np.asarray(positions, np.float64)
    if at.ndim != 1:
        fail("positions", f"shape {at.shape}", "a number of tokens, or a vector")
    frequencies = float(base) ** (-np.arange(0, width, 2) / width)
    angles = np.remainder(at[:, None] * frequencies[None], 2 * np.pi)
    return angles.astype(jnp.zeros(()).dtype if dtype is None else dtype)


def rotate(x: Float[AnyArray, "n d"], angles: Float[AnyArray, "n half"]) -> Float[Array, "n d"]:
    """R_i x_i for every row: coordinates (m, half + m) turned by angles[i, m]. O(n d)."""
    half = angles.shape[1]
    first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, 1)


def rotate_back(
    x: Float[AnyArray, "n d"], angles: Float[AnyArray, "n half"]
) -> Float[Array, "n d"]:
    """R_i^T x_i for every row: what takes a gradient in rotated rows to one in the rows."""
    return rotate(x, -angles)


def as_rotations(given: Any) -> Rotations | None:
    """One array of angles, for queries and keys alike, or a pair of them, as Rotations."""
    if given is None:
        return None
    if isinstance(given, tuple | list) and len(given) == 2:
        return Rotations(*given)
    return Rotations(given, given)
