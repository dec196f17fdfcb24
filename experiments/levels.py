"""The hierarchical low-rank structure itself: ranks of f, q, p1, p2 and p beside the widths of the
paper's chain, and ranks of their blocks under a tree on queries and keys, level by level.

The chain f -> q -> p1 -> p2 -> p of Lemmas 3.3 to 3.7 gives factors of width k1, d, k1 d and k1. The
eps-rank, by singular values, is what no factor of any kind can be narrower than:

    rank(M, eps) = min { k : sum_{i > k} sigma_i^2 <= eps^2 || M ||_F^2 }

The tree halves queries and keys, each where they spread most, at the median; level l has 4^l blocks
of L / 2^l tokens on a side. Each block may lose an equal share, eps^2 || M ||_F^2 / 4^l, so a level as
a whole is as good as the matrix at level 0, and levels compare by the numbers that they store.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int
from pydantic import PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.problems import boxes, minilm
from experiments.runner.config import Fields
from lora_limits.coordinates import frame as frames
from lora_limits.gradients.exact import dense_terms
from lora_limits.instruments.compiling import quick_jit

VERSION = 1
POINTS = ("lengths", "gammas", "families", "seeds", "heads")
X64 = True
MATRICES = ("f", "q", "p1", "p2", "p")
HIGHEST = 40  # no degree above it is tried for the chain's width


class Config(Fields):
    """families x lengths x gammas x seeds at d = ceil(log2 L), and the first `heads` real heads of
    each layer at head_length tokens. levels: of the tree, beside level 0.
    """

    lengths: tuple[PositiveInt, ...]
    gammas: tuple[PositiveFloat, ...]
    families: tuple[Literal["uniform", "gaussian", "outliers", "gadget"], ...]
    seeds: tuple[int, ...] = (0,)
    heads: PositiveInt = 2
    head_length: PositiveInt = 512
    rank: PositiveInt = 4
    levels: PositiveInt = 4


def points(config: Config) -> list[dict[str, Any]]:
    """Synthetic families, then heads."""
    out: list[dict[str, Any]] = [
        {
            "kind": "family",
            "family": family,
            "length": n,
            "width": math.ceil(math.log2(n)),
            "gamma": gamma,
            "seed": seed,
        }
        for n in config.lengths
        for family in config.families
        for gamma in config.gammas
        for seed in config.seeds
    ]
    seen: dict[int, int] = {}
    for layer, head in minilm.heads():
        place = seen.get(layer, 0)
        seen[layer] = place + 1
        if place < config.heads:
            out.append({"kind": "head", "layer": layer, "head": head})
    return out


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """{"ranks": {tolerance: {matrix: rank}}, "widths": {tolerance: {matrix: of the chain}}, "tree":
    {tolerance: {matrix: [{"rank", "most", "stored"} by level]}}}.
    """
    problem = _problem(point, config)
    terms = {name: np.asarray(x) for name, x in quick_jit(dense_terms)(problem).items()}
    length = len(terms["f"])
    reach, kernel = _scores(problem)
    order = _halved(terms["Q"], config.levels), _halved(terms["K"], config.levels)
    tolerances = {"1/L": 1 / length, "1%": 0.01}
    values = {name: np.linalg.svd(terms[name], compute_uv=False) for name in MATRICES}
    tree = {name: terms[name][np.ix_(*order)] for name in ("f", "p")}
    blocks = {name: [_block_values(x, level) for level in range(config.levels + 1)]
              for name, x in tree.items()}  # fmt: skip
    d, dv = terms["Q"].shape[1], terms["V"].shape[1]
    out: dict[str, Any] = {
        "score_bound": reach,
        "score_ratio": reach / math.log(length),
        "tokens": length,
        "ranks": {},
        "widths": {},
        "tree": {},
    }
    for name, eps in tolerances.items():
        out["ranks"][name] = {m: rank(values[m], eps) for m in MATRICES}
        out["widths"][name] = _chain_widths(kernel, terms["f"], eps, d, dv)
        out["tree"][name] = {
            m: [_level(x, eps, values[m]) for x in levels] for m, levels in blocks.items()
        }
    return out


def _problem(point: dict[str, Any], config: Config) -> ll.LoRAProblem:
    """The problem of a point, with a target that has its noise."""
    if point["kind"] == "head":
        return minilm.problem(
            point["layer"],
            point["head"],
            length=config.head_length,
            rank=config.rank,
            seed=0,
            dtype="float64",
        )
    problem = boxes.problem(
        point["family"],
        point["seed"],
        length=point["length"],
        width=point["width"],
        rank=config.rank,
        gamma=point["gamma"],
    )
    drawn = np.random.default_rng(point["seed"] + 1).normal(size=problem.target.shape)
    target = boxes.noise(point["family"]) * drawn
    return jax.tree_util.tree_map_with_path(
        lambda path, x: target if path[0].name == "target" else x, problem
    )


def rank(values: Float[np.ndarray, " n"], eps: float) -> int:
    """The eps-rank of a matrix with these singular values, largest first."""
    return int(_ranks(values, eps**2 * (values**2).sum()))


def _ranks(values: Float[np.ndarray, "*some n"], lost: float) -> Int[np.ndarray, "*some"]:
    """How many values must stay so that the squares of the others sum to at most `lost`."""
    left = np.cumsum(values[..., ::-1] ** 2, -1)
    return values.shape[-1] - (left <= lost).sum(-1)


def _scores(problem: ll.LoRAProblem) -> tuple[float, Callable[[int], np.ndarray]]:
    """(largest centred score, degree -> f~ by Taylor's polynomial in the library's frame)."""
    frame = quick_jit(frames.of_problem)(problem)
    q = np.asarray(frame.centred_queries(problem, problem.x_query))
    k = frame.centred_keys(problem, problem.x_key)
    w = np.exp(np.asarray(frame.log_weights(k)))
    s = float(frame.beta) * q @ np.asarray(k).T
    powers = [np.ones_like(s)]
    total = [powers[0]]

    def approximate(degree: int) -> np.ndarray:
        while len(total) <= degree:
            powers.append(powers[-1] * s / len(powers))
            total.append(total[-1] + powers[-1])
        rows = w[None] * total[degree]
        return rows / rows.sum(1, keepdims=True)

    return float(np.abs(s).max()), approximate


def _chain_widths(
    approximate: Callable[[int], np.ndarray], f: np.ndarray, eps: float, d: int, dv: int
) -> dict[str, int | None]:
    """k1, the features of the first degree whose f~ is within eps of f, and what follows from it."""
    size = np.linalg.norm(f)
    enough = (g for g in range(HIGHEST) if np.linalg.norm(approximate(g) - f) <= eps * size)
    degree = next(enough, None)
    if degree is None:
        return dict.fromkeys(MATRICES)
    k1 = math.comb(d + degree, degree)
    # p = p1 - p2, one factor beside the other
    return {"f": k1, "q": dv, "p1": k1 * dv, "p2": k1, "p": k1 * dv + k1}


def _halved(x: Float[np.ndarray, "l d"], levels: int) -> Int[np.ndarray, " l"]:
    """The order of rows in which every node of the tree is a run of equal length."""
    parts = [np.arange(len(x))]
    for _ in range(levels):
        parts = [half for part in parts for half in _split(x, part)]
    return np.concatenate(parts)


def _split(x: np.ndarray, part: np.ndarray) -> list[np.ndarray]:
    """A node in two, at the median of its first principal direction."""
    centred = x[part] - x[part].mean(0)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return np.array_split(part[np.argsort(centred @ direction, kind="stable")], 2)


def _block_values(x: np.ndarray, level: int) -> Float[np.ndarray, "blocks n"]:
    """Singular values of the 4^level blocks."""
    n = len(x) >> level
    blocks = x.reshape(2**level, n, 2**level, n).transpose(0, 2, 1, 3).reshape(-1, n, n)
    return np.linalg.svd(blocks, compute_uv=False)


def _level(blocks: np.ndarray, eps: float, values: np.ndarray) -> dict[str, float]:
    """Mean and largest rank of the blocks, and the numbers stored over those of the matrix: of a
    block its factors, or itself where that is less.
    """
    count, n = blocks.shape
    ranks = _ranks(blocks, eps**2 * (values**2).sum() / count)
    stored = np.minimum(2 * n * ranks, n * n).sum() / (count * n * n)
    return {"rank": float(ranks.mean()), "most": int(ranks.max()), "stored": float(stored)}
