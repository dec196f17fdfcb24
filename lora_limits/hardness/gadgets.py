"""Attention heads whose scores are distances: the instance of Theorem 4.1, free of overflow.

A gadget holds integer rows x_i (queries) and y_j (keys) in d coordinates. A pair is sought with
x_i . y_j >= level; the promise is that every other pair has x_i . y_j <= level - gap. With the
paper's temperature beta = 1/d (Definition E.1) and an inverse noise level beta0, the tokens are

    queries  Gamma [x_i, 1_w]              n of them, the others zero          Gamma = sqrt(d beta0)
    keys     Gamma [y_j, 0_w]              n of them, the others are pads
    pads     [0_d, e 1_w]                  e = pad d / (Gamma w)

so that S_ij = beta0 x_i . y_j and S_i,pad = pad for every live query. With v = 1 on the real keys
and 0 on the P pads, and pad = beta0 level + sigma - ln P,

    tau_i = (f v)_i = o_i / (1 + o_i),     o_i = sum_j exp(beta0 (x_i . y_j - level) - sigma)    "the odds of row i"

A sought pair gives o_i >= e^-sigma. None gives o_i <= n_b e^(-beta0 gap - sigma) for all i, and so

    sum_i tau_i^2 <= n_a n_b^2 e^(-2 beta0 gap) = e^(-2 c)     for beta0 = (ln(n_a)/2 + ln(n_b) + c) / gap

which is 1.5 ln n + c over the gap when both sides have n rows. Exponentials are taken by the
softmax alone, on scores of size R = O(beta0 d): pads and scales stay in the log domain.

Hamming distance on {0,1}^d: x = 1 - 2a, y = 1 - 2b, x . y = d - 2 dist, so level = d - 2t and
gap = 2 Delta; pads use w = d columns, which keeps them under Gamma too. R = beta0 d = Gamma^2 =
Theta(log L) for Delta = Theta(d): the regime of the theorem. Orthogonal vectors: x = a, y = -b,
level 0, gap 1, one pad column; no gap theorem is needed, and the price is R = beta0 max <a, b>,
which is Theta(log^2 L) when d = Theta(log L).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lora_limits.checks import fail

LEAST_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Gadget:
    """Rows x and y, the score level of a sought pair, and the gap below it, promised empty."""

    queries: Int[np.ndarray, "na d"]
    keys: Int[np.ndarray, "nb d"]
    level: float
    gap: float
    top: float  # no x_i . y_j exceeds it
    reach: float  # none exceeds it in size
    pad_width: int  # w, the columns that carry the pads

    @property
    def width(self) -> int:
        """d, the width of the rows; 1/d is the temperature."""
        return self.queries.shape[1]

    @property
    def tokens(self) -> int:
        """L: a power of two above both sides, at least 64, so that compiled oracles serve again."""
        return max(LEAST_TOKENS, 2 ** max(len(self.queries), len(self.keys)).bit_length())


def binary_sets(a: Any, b: Any) -> tuple[Int[np.ndarray, "na d"], Int[np.ndarray, "nb d"]]:
    """Both sets as integers, zeros and ones. O(n d). Raises ValueError for anything else."""
    out = []
    for name, rows in (("a", a), ("b", b)):
        x = np.asarray(rows)
        if x.ndim != 2:
            fail(name, f"shape {x.shape}", "(vectors, coordinates)")
        if 0 in x.shape:
            fail(name, f"shape {x.shape}", "at least one vector and one coordinate")
        wrong = (x != 0) & (x != 1)
        if wrong.any():
            fail(f"{name}[{int(np.argwhere(wrong)[0, 0])}]", f"entry {x[wrong][0]}", "0 or 1")
        # Unsigned or boolean entries could not be negated.
        out.append(x.astype(np.int64))
    if out[0].shape[1] != out[1].shape[1]:
        fail("b", f"vectors of width {out[1].shape[1]}", f"{out[0].shape[1]}, the width of a")
    return out[0], out[1]


def hamming_gadget(a: Any, b: Any, distance: float, gap: float) -> Gadget:
    """Is some pair within `distance`, if all others are at `distance + gap` or beyond? O(n d).

    Raises ValueError for sets that are not binary, a distance outside 0..d, or a gap that is not
    positive.
    """
    x, y = binary_sets(a, b)
    d = x.shape[1]
    if not 0 <= distance <= d:
        fail("distance", distance, f"a number from 0 to {d}, the width")
    if not 0 < gap < math.inf:
        fail("gap", gap, "a finite number above 0")
    return Gadget(1 - 2 * x, 1 - 2 * y, d - 2 * distance, 2 * gap, d, d, pad_width=d)


def orthogonal_gadget(a: Any, b: Any) -> Gadget:
    """Is some <a_i, b_j> zero? O(n d). Raises ValueError for sets that are not binary."""
    x, y = binary_sets(a, b)
    # -y turns "smallest" into "largest", which is what softmax finds.
    # Inner products are integers, so the gap is 1 and always holds.
    reach = min(x.sum(1).max(), y.sum(1).max())
    return Gadget(x, -y, 0.0, 1.0, 0.0, float(reach), pad_width=1)


def inverse_noise(gadget: Gadget, log_slack: float) -> float:
    """beta0 such that without a sought pair sum_i tau_i^2 <= exp(-2 log_slack) at sigma = 0."""
    log_odds = 0.5 * math.log(len(gadget.queries)) + math.log(len(gadget.keys)) + log_slack
    return log_odds / gadget.gap


def pad_score(gadget: Gadget, beta0: float, sigma: float) -> float:
    """S_i,pad, such that all pads together weigh exp(beta0 level + sigma)."""
    pads = gadget.tokens - len(gadget.keys)
    return beta0 * gadget.level + sigma - math.log(pads)


def score_range(gadget: Gadget, beta0: float) -> float:
    """Largest range of a row of S at sigma = 0."""
    pad = pad_score(gadget, beta0, 0.0)
    return max(beta0 * gadget.top, pad) - min(-beta0 * gadget.reach, pad)


def max_norm(gadget: Gadget, beta0: float) -> float:
    """Gamma = sqrt(d beta0), the bound of every entry but the pads'; for Hamming R = Gamma^2."""
    return math.sqrt(gadget.width * beta0)


def pad_entry(gadget: Gadget, beta0: float, sigma: float) -> float:
    """e, the entry of a pad: its score is beta Gamma e w."""
    size = max_norm(gadget, beta0) * gadget.pad_width
    return pad_score(gadget, beta0, sigma) * gadget.width / size


def token_rows(
    gadget: Gadget, beta0: float, sigma: float
) -> tuple[Float[np.ndarray, "l d_w"], Float[np.ndarray, "l d_w"], Float[np.ndarray, " l"]]:
    """(queries, keys, v) of L tokens, d + w wide, float64. O(L d)."""
    d = gadget.width
    w = gadget.pad_width
    length = gadget.tokens
    size = max_norm(gadget, beta0)
    queries = np.zeros((length, d + w))
    keys = np.zeros((length, d + w))
    v = np.zeros(length)
    na = len(gadget.queries)
    nb = len(gadget.keys)
    # live queries, the others zero
    queries[:na, :d] = size * gadget.queries
    queries[:na, d:] = size
    # real keys, then pads
    keys[:nb, :d] = size * gadget.keys
    keys[nb:, d:] = pad_entry(gadget, beta0, sigma)
    v[:nb] = 1.0
    return queries, keys, v
