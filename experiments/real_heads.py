"""Remark 5.2 on real attention heads, of an encoder and of a decoder: norms raw and centred, before and
after rotation, the rank of f, and the degree and features that polynomials need.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import degrees
from experiments.problems import minilm, real, smollm2
from experiments.runner.config import Fields
from lora_limits.gradients.exact import dense_terms
from lora_limits.instruments.compiling import quick_jit

VERSION = 2
POINTS = ("most", "decoder_lengths", "decoder_most")
PLACES = ("decoder",)
X64 = True
EMBEDDED = 8  # heads of each layer
DENSE = 2048  # tokens up to which all scores are looked at, beyond which norms alone are


class Config(Fields):
    """`most` heads of each layer of the encoder at `length` tokens, and `decoder_most` of each layer
    of the decoder at `decoder_lengths` (tame to wild); relative Frobenius errors.

    decoder: a file made by experiments/data/make_smollm2_heads.py; "" for the two heads embedded.
    """

    length: int = Field(default=minilm.TOKENS, ge=2, le=minilm.TOKENS)
    most: int = Field(default=EMBEDDED, ge=1, le=EMBEDDED)
    decoder: str = ""
    decoder_lengths: tuple[PositiveInt, ...] = (512, 2048)
    decoder_most: NonNegativeInt = 4
    rank: PositiveInt = 4
    tolerances: tuple[PositiveFloat, ...] = (0.1, 0.01)
    highest: PositiveInt = 24
    seed: int = 0


def points(config: Config) -> list[dict[str, Any]]:
    """One point a head and length."""
    path = real.path("decoder", config.decoder, "decoder")
    real.check_lengths("decoder_lengths", config.decoder_lengths, path)
    encoder = [
        {"model": "encoder", "layer": layer, "head": head, "length": config.length}
        for layer, head in real.spread(minilm.PATH, config.most)
    ]
    return encoder + [
        {"model": "decoder", "layer": layer, "head": head, "length": length}
        for length in config.decoder_lengths
        for layer, head in real.spread(path, config.decoder_most)
    ]


def inputs(config: Config) -> dict[str, Any]:
    """Hashes of the files of heads."""
    path = real.path("decoder", config.decoder, "decoder")
    return {
        "heads": minilm.fingerprint()["heads"],
        "decoder_heads": minilm.fingerprint(path)["heads"],
    }


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms, R / ln L, ranks, and for each tolerance the degree and the features k*.

    Of a decoder norms are of the rotated rows, as if every query saw every key; "before" has them
    of the same rows before rotation. Beyond DENSE tokens there are norms alone.
    """
    problem = _problem(point, config)
    out: dict[str, Any] = _norms(problem, rotated=True)
    if problem.rotations is not None:
        out["before"] = _norms(problem, rotated=False)
    return out | _dense(problem, config) if point["length"] <= DENSE else out


def _dense(problem: ll.LoRAProblem, config: Config) -> dict[str, Any]:
    """Scores, ranks of f, and the degrees that the gradient needs: from L x L matrices."""
    exact = quick_jit(ll.gradient, static_argnames="method")(problem, method=ll.Exact()).gradient
    highest = min(config.highest, degrees.HIGHEST)
    scan = degrees.errors_by_degree(problem, range(1, highest + 1), exact)
    out: dict[str, Any] = _scores(problem)
    out["errors"] = [row["frobenius_error"] for row in scan]
    out["ranks"] = {"f": ranks(dense_terms(problem)["f"], config.tolerances)}
    if problem.rotations is not None:
        for name, rotated in (("without_mask", True), ("without_rotation_and_mask", False)):
            met = smollm2.as_they_meet(problem, rotated=rotated)
            out["ranks"][name] = ranks(dense_terms(met)["f"], config.tolerances)
    width = problem.weights.query.shape[1]
    needed = {}
    for tolerance in config.tolerances:
        degree = degrees.first_below(scan, "frobenius_error", tolerance)
        features = None if degree is None else math.comb(width + degree, degree)
        needed[str(tolerance)] = {"degree": degree, "features": features}
    out["needed"] = needed
    return out


def _problem(point: dict[str, Any], config: Config) -> ll.LoRAProblem:
    given: dict[str, Any] = {"path": real.path(point["model"], config.decoder, "decoder")}
    if point["model"] == "encoder":
        given = {}
    given |= {"rank": config.rank, "seed": config.seed, "dtype": "float64"}
    make = real.MODELS[point["model"]].problem
    return make(point["layer"], point["head"], length=point["length"], **given)


def ranks(f: jax.Array, tolerances: tuple[float, ...]) -> dict[str, int]:
    """For each tolerance the smallest k at which some rank-k matrix is as near to f, relative.

    In Frobenius norm: f's singular values but the first k.
    """
    squares = np.asarray(jnp.linalg.svd(f, compute_uv=False)) ** 2
    # What is left out at k = 0, 1, ...: sums of the smallest squares.
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return {str(t): int(np.argmax(left <= t**2 * left[0])) for t in tolerances}


def _norms(problem: ll.LoRAProblem, *, rotated: bool) -> dict[str, float]:
    """Norms of the rows as they meet in the scores, or as they are before rotation."""
    if problem.rotations is not None:
        problem = smollm2.as_they_meet(problem, rotated=rotated)
    report = quick_jit(ll.norm_report)(problem)
    names = (
        "gamma",
        "gamma_centred",
        "gamma_ratio",
        "score_bound",
        "score_bound_raw",
        "score_ratio",
    )
    return {name: float(getattr(report, name)) for name in names}


def _scores(problem: ll.LoRAProblem) -> dict[str, float]:
    """Largest score and spread, raw and centred, over the pairs that see each other.

    Centred as the library centres: the queries about their mean, the keys about their mean under
    the weights exp(beta nu . K_j).
    """
    terms = dense_terms(problem)
    q, k, f = (np.asarray(terms[n]) for n in ("Q", "K", "f"))
    seen = np.tri(*f.shape, dtype=bool) if problem.causal else np.ones(f.shape, bool)
    beta = float(problem.beta)
    weights = np.exp(beta * (k @ q.mean(0) - (k @ q.mean(0)).max()))
    centre = weights @ k / weights.sum()
    raw = (beta * q @ k.T)[seen]
    centred = (beta * (q - q.mean(0)) @ (k - centre).T)[seen]
    return {
        "score_max": float(np.abs(raw).max()),
        "score_max_centred": float(np.abs(centred).max()),
        "score_std": float(raw.std()),
        "score_std_centred": float(centred.std()),
    }
