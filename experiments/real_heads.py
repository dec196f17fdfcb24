"""Remark 5.2 on real attention heads: norms raw and centred, and the degree and features that they
need.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import degrees
from experiments.problems import minilm
from experiments.runner.config import Fields
from lora_limits.gradients.exact import dense_terms
from lora_limits.instruments.compiling import quick_jit

VERSION = 1
POINTS = ("most",)
X64 = True
EMBEDDED = 8  # heads of each layer


class Config(Fields):
    """The first `most` embedded heads of each layer (tame to wild), at `length` tokens; relative
    Frobenius errors.
    """

    length: int = Field(default=minilm.TOKENS, ge=2, le=minilm.TOKENS)
    most: int = Field(default=EMBEDDED, ge=1, le=EMBEDDED)
    rank: PositiveInt = 4
    tolerances: tuple[PositiveFloat, ...] = (0.1, 0.01)
    highest: PositiveInt = 24
    seed: int = 0


def points(config: Config) -> list[dict[str, Any]]:
    """One point a head."""
    seen: dict[int, int] = {}
    out = []
    spacing = max(1, EMBEDDED // config.most)
    for layer, head in minilm.heads():
        place = seen.get(layer, 0)
        seen[layer] = place + 1
        if place % spacing == 0 and place // spacing < config.most:
            out.append({"layer": layer, "head": head})
    return out


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the file of heads."""
    return minilm.fingerprint()


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms, R / ln L, and for each tolerance the degree, the features k*, and the length from
    which k* < L.
    """
    problem = minilm.problem(
        point["layer"],
        point["head"],
        length=config.length,
        rank=config.rank,
        seed=config.seed,
        dtype="float64",
    )
    report = quick_jit(ll.norm_report)(problem)
    exact = quick_jit(ll.gradient, static_argnames="method")(problem, method=ll.Exact()).gradient
    highest = min(config.highest, degrees.HIGHEST)
    scan = degrees.errors_by_degree(problem, range(1, highest + 1), exact)
    # Centred as the library centres: the queries about their mean, the keys about their mean under
    # the weights exp(beta nu . K_j).
    q, k = (np.asarray(dense_terms(problem)[n]) for n in ("Q", "K"))
    beta = float(problem.beta)
    weights = np.exp(beta * (k @ q.mean(0) - (k @ q.mean(0)).max()))
    centre = weights @ k / weights.sum()
    centred = beta * (q - q.mean(0)) @ (k - centre).T
    out: dict[str, Any] = {
        "gamma": float(report.gamma),
        "gamma_centred": float(report.gamma_centred),
        "gamma_ratio": float(report.gamma_ratio),
        "score_bound": float(report.score_bound),
        "score_ratio": float(report.score_ratio),
        "score_max": float(np.abs(beta * q @ k.T).max()),
        "score_max_centred": float(np.abs(centred).max()),
        "score_std": float((beta * q @ k.T).std()),
        "score_std_centred": float(centred.std()),
        "errors": [row["frobenius_error"] for row in scan],
    }
    width = q.shape[1]
    needed = {}
    for tolerance in config.tolerances:
        degree = degrees.first_below(scan, "frobenius_error", tolerance)
        features = None if degree is None else math.comb(width + degree, degree)
        needed[str(tolerance)] = {"degree": degree, "features": features}
    out["needed"] = needed
    return out
