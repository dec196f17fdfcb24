"""Rotary positions, found from what goes into them and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lora_limits.instruments.comparing import frobenius_error

FEW = 256  # tokens on which layouts are told apart
Rows = Float[np.ndarray, "l d"]


class Rotary(NamedTuple):
    """z = factor R_i y for queries and for keys, R_i turning coordinates m and n + m by angles[i, m].

    columns: the order in which the coordinates of a head come to lie so; scores do not mind it.
    """

    angles: Float[np.ndarray, "l n"]
    columns: Int[np.ndarray, " d"]
    query_factor: float
    key_factor: float


def find_rotary(query: tuple[Rows, Rows], key: tuple[Rows, Rows], *, close: float) -> Rotary | None:
    """The rotation that takes both from the first rows, before positions, to the second.

    The pairs of coordinates are halves of those that are turned (Llama), or neighbours (GPT-J), the
    turned ones all or the first of them (GPT-NeoX). None where no rotation comes within `close`,
    relative.
    """
    few = ((query[0][:FEW], query[1][:FEW]), (key[0][:FEW], key[1][:FEW]))
    for columns, count in _layouts(query[0].shape[1]):
        if _fit(*few, columns, count, close) is not None:
            return _fit(query, key, columns, count, close)
    return None


def _layouts(width: int) -> Iterator[tuple[np.ndarray, int]]:
    """(order of the coordinates, number of angles), the whole head first."""
    for count in range(width // 2, 0, -1):
        turned = np.arange(2 * count)
        rest = np.arange(2 * count, width)
        yield np.concatenate([turned, rest]), count
        yield np.concatenate([turned[::2], turned[1::2], rest]), count


def _fit(
    query: tuple[Rows, Rows],
    key: tuple[Rows, Rows],
    columns: np.ndarray,
    count: int,
    close: float,
) -> Rotary | None:
    pairs = []
    for before, after in (query, key):
        y, z = (x[:, columns].astype(np.float64) for x in (before, after))
        pairs.append((y, z))
    # Least squares: conj(y) z of pairs as complex numbers has the angle as its argument.
    products = [np.conj(_complex(y, count)) * _complex(z, count) for y, z in pairs]
    angles = np.angle(products[0] + products[1])
    factors = []
    for y, z in pairs:
        turned = turn(y, angles)
        factor = float((turned * z).sum() / max(float((turned**2).sum()), 1e-30))
        # "not <=", so that NaN is no rotation either.
        if not (factor > 0 and frobenius_error(factor * turned, z) <= close):
            return None
        factors.append(factor)
    return Rotary(angles, columns, *factors)


def _complex(rows: Rows, count: int) -> np.ndarray:
    return rows[:, :count] + 1j * rows[:, count : 2 * count]


def turn(rows: Rows, angles: Float[np.ndarray, "l n"]) -> Rows:
    """R_i of every row."""
    count = angles.shape[1]
    turned = _complex(rows, count) * np.exp(1j * angles)
    return np.concatenate([np.real(turned), np.imag(turned), rows[:, 2 * count :]], axis=1)
