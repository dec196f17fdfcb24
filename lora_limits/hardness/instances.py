"""Instances whose answers are known: drawn or planted, every NO by brute force, O(n^2 d)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from lora_limits.checks import fail

ATTEMPTS = 50  # to draw points that are far enough apart


# Two sets of binary vectors.
Pair = tuple[Int[np.ndarray, "n d"], Int[np.ndarray, "n d"]]


def distances(a: Int[np.ndarray, "na d"], b: Int[np.ndarray, "nb d"]) -> Int[np.ndarray, "na nb"]:
    """Hamming distance of every pair. O(n^2 d), by a floating product, which is exact here."""
    agreement = (1.0 - 2.0 * a) @ (1.0 - 2.0 * b).T
    return ((a.shape[1] - agreement) / 2).astype(int)


def closest(a: Int[np.ndarray, "na d"], b: Int[np.ndarray, "nb d"]) -> int:
    """Smallest Hamming distance between the two sets, by brute force."""
    return int(distances(a, b).min())


def has_orthogonal_pair(a: Int[np.ndarray, "na d"], b: Int[np.ndarray, "nb d"]) -> bool:
    """Whether some <a_i, b_j> = 0, by brute force."""
    return bool((np.asarray(a, float) @ np.asarray(b, float).T < 0.5).any())


def random_neighbours(
    rng: np.random.Generator, n: int, width: int, distance: int, gap: int, answer: bool
) -> Pair:
    """Uniform points with all pairs at `distance + gap` or beyond, for a YES but one.

    That one is moved to exactly `distance`. Points that come too near are drawn again.
    Raises ValueError if that does not end: the width is too small.
    """
    a = rng.integers(0, 2, (n, width))
    b = rng.integers(0, 2, (n, width))
    for _ in range(ATTEMPTS):
        near = distances(a, b) < distance + gap
        rows = np.flatnonzero(near.any(1))
        if not len(rows):
            break
        a[rows] = rng.integers(0, 2, (len(rows), width))
    else:
        apart = distance + gap
        fail("width", width, f"more: {n} points at distance {apart} were not found")
    if answer:
        i, j = rng.integers(n, size=2)
        b[j] = a[i]
        flipped = rng.choice(width, distance, replace=False)
        b[j, flipped] = 1 - b[j, flipped]
    return a, b


def clustered_neighbours(
    rng: np.random.Generator, n: int, width: int, distance: int, gap: int, answer: bool
) -> Pair:
    """The worst case: every pair at exactly `distance + gap`, for a YES but one.

    A NO so comes as near to YES as the promise allows. For a YES one a_i is moved `gap` nearer to
    one b_j, and is no nearer than distance to any other.
    Raises ValueError for a width below distance + gap.
    """
    if distance + gap > width:
        fail("width", width, f"at least distance + gap = {distance + gap}")
    centre = rng.integers(0, 2, width)
    a = np.tile(centre, (n, 1))
    b = np.tile(centre, (n, 1))
    # All a_i are one point, so that every distance is decided by b alone.
    for row in b:
        flipped = rng.choice(width, distance + gap, replace=False)
        row[flipped] = 1 - row[flipped]
    if answer:
        i, j = rng.integers(n, size=2)
        differ = rng.permutation(np.flatnonzero(a[i] != b[j]))[:gap]
        a[i, differ] = b[j, differ]
    return a, b


def random_orthogonality(
    rng: np.random.Generator, n: int, width: int, answer: bool, density: float = 0.5
) -> Pair:
    """Binary vectors with an orthogonal pair planted, or with none.

    For none, offending pairs are given a coordinate in common. The planted pair shares no
    coordinate and covers all. Low density or width makes inner products of exactly 1 common.
    """
    a, b = ((rng.random((n, width)) < density).astype(np.int64) for _ in range(2))
    products = a @ b.T
    # Whether an orthogonal pair is there would be left to chance.
    for i, j in np.argwhere(products == 0):
        shared = rng.integers(width)
        a[i, shared] = b[j, shared] = 1
    if answer:
        i, j = rng.integers(n, size=2)
        b[j] = 1 - a[i]
    return a, b


def random_3sat(rng: np.random.Generator, variables: int, ratio: float = 4.26) -> list[list[int]]:
    """round(ratio variables) clauses on three distinct variables each.

    Half of these formulas are satisfiable near ratio 4.26, where deciding is hardest.
    Raises ValueError for fewer than 3 variables.
    """
    if variables < 3:
        fail("variables", variables, "at least 3")
    clauses = []
    for _ in range(round(ratio * variables)):
        chosen = 1 + rng.choice(variables, 3, replace=False)
        signs = rng.choice([-1, 1], 3)
        clauses.append([int(s * x) for s, x in zip(signs, chosen, strict=True)])
    return clauses
