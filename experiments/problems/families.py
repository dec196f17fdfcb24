"""Families of LoRA problems, from independent noise to one-hot values, whose largest centred score
is set exactly.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

import lora_limits as ll
from lora_limits.problem import NAMES

Kind = Literal[
    "independent",
    "self-attention",
    "outliers",
    "anisotropic",
    "signs",
    "clustered",
    "one-hot value",
]
KINDS: tuple[str, ...] = get_args(Kind)
OUTLIER = 30.0  # times as long as the other tokens, one in sixteen


def inputs(rng: np.random.Generator, kind: str, length: int, width: int) -> dict[str, np.ndarray]:
    """The tokens of the three projections, (length, width) each.

    independent: gaussian, three draws; in every other family queries, keys and values share their
    tokens. self-attention: gaussian. outliers: some of them long. anisotropic: scales over two
    orders. signs: entries +-1. clustered: round four centres. one-hot value: gaussian, but one
    value alone is not 0. Raises ValueError for others.
    """
    x = rng.normal(size=(length, width))
    if kind == "independent":
        return {"query": x, "key": rng.normal(size=x.shape), "value": rng.normal(size=x.shape)}
    if kind == "one-hot value":
        value = np.zeros_like(x)
        value[rng.integers(length), rng.integers(width)] = 1
        return {"query": x, "key": x, "value": value}
    if kind == "outliers":
        x[rng.choice(length, size=-(-length // 16), replace=False)] *= OUTLIER
    elif kind == "anisotropic":
        x = x * np.geomspace(1, 0.01, width)
    elif kind == "signs":
        x = np.sign(x)
    elif kind == "clustered":
        x = 2 * rng.normal(size=(4, width))[rng.integers(4, size=length)] + 0.1 * x
    elif kind != "self-attention":
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    return dict.fromkeys(NAMES, x)


def problem(
    rng: np.random.Generator, kind: str, *, length: int, width: int, rank: int, reach: float
) -> ll.LoRAProblem:
    """A float64 problem with all three projections adapted whose centred scores reach `reach`; beta
    = 1/width.

    Weights, adapters and target are gaussian; the query's weight and A are scaled to meet the
    reach.
    """
    x = inputs(rng, kind, length, width)
    scale = 1 / rank
    beta = 1 / width
    w = {name: rng.normal(size=(width, width)) / width**0.5 for name in NAMES}
    a = {name: 0.5 * rng.normal(size=(rank, width)) for name in NAMES}
    b = {name: 0.5 * rng.normal(size=(width, rank)) for name in NAMES}
    target = rng.normal(size=(length, width))
    q, k = (x[name] @ (w[name] + scale * b[name] @ a[name]) for name in ("query", "key"))
    # Both the frozen weight and A, so that the adapter keeps its share of the score.
    factor = _stretch(beta * q, k, reach)
    w["query"], a["query"] = factor * w["query"], factor * a["query"]
    return ll.LoRAProblem(
        x["query"],
        x["key"],
        x["value"],
        target,
        weights=ll.AttentionWeights(**w),
        adapters={name: ll.Adapter(a[name], b[name]) for name in NAMES},
        scale=scale,
        beta=beta,
    )


def _stretch(q: np.ndarray, k: np.ndarray, reach: float) -> float:
    """The factor t of the queries that makes max |t (Q_i - nu) . (K_j - mu)| the reach.

    nu is the mean of the queries and mu that of the keys under the weights exp(t nu . K_j), so mu
    moves with t.
    """
    nu = q.mean(0)
    scores = (q - nu) @ k.T
    drift = k @ nu
    low = scores.min(1)
    high = scores.max(1)

    def reached(factor: float) -> float:
        weights = np.exp(factor * (drift - drift.max()))
        centre = scores @ weights / weights.sum()
        return float(factor * np.maximum(high - centre, centre - low).max())

    # mu lies among the keys, so what is reached is between half the spread of a row and all of it.
    least = reach / float((high - low).max())
    most = 2 * least
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (middle, most) if reached(middle) < reach else (least, middle)
    return (least + most) / 2
