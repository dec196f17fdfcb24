"""The paper's chain term by term: the error of every lemma beside its bound, for polynomial factors
and the best one.

Factors of f: "taylor" and "chebyshev" polynomials of a degree (Lemma 3.3), and "svd", f cut at a
rank, which no factor of that width betters in the Frobenius norm. Errors and bounds are those of
lora_limits.gradients.chain_bounds, dense, on a sample of the queries against all keys: every term
has a row for a query.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.runner.config import Fields, Tokens
from lora_limits.gradients import chain, chain_bounds, exact
from lora_limits.polynomial import needed
from lora_limits.problem import NAMES

VERSION = 2
X64 = True
POINTS = ("gammas", "series", "seeds")


class Config(Fields):
    """One random self-attention problem for each gamma and seed, all three projections adapted, beta
    = 1/width. length: of its keys; rows: queries drawn from it, all of them where fewer.

    degrees: of the polynomial factors, of which each series is tried; ranks: widths k1 of the SVD
    factor.
    """

    length: Tokens
    rows: PositiveInt = 256
    width: PositiveInt
    rank: PositiveInt
    gammas: tuple[PositiveFloat, ...]
    series: tuple[Literal["taylor", "chebyshev"], ...]
    degrees: tuple[NonNegativeInt, ...]
    ranks: tuple[PositiveInt, ...]
    seeds: PositiveInt = 3


def points(config: Config) -> list[dict[str, Any]]:
    """Each factor of each size at each gamma, for every seed."""
    sizes = [(name, size) for name in config.series for size in config.degrees]
    sizes += [("svd", k) for k in config.ranks]
    return [
        {"gamma": gamma, "factor": name, "size": size, "seed": seed}
        for gamma in config.gammas
        for seed in range(config.seeds)
        for name, size in sizes
    ]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """terms: {name: [max-norm error, bound, largest exact entry]}; k1; row-l1 error of f, Lemma
    3.3's bound of it.
    """
    shape = (config.length, config.rows, config.width, config.rank)
    problem, true, sizes, radius = _prepare(point["gamma"], shape, point["seed"])
    if point["factor"] == "svd":
        # The singular values go to the left factor.
        u, s, vt = jnp.linalg.svd(true["f"])
        u1 = u[:, : point["size"]] * s[None, : point["size"]]
        v1 = vt[: point["size"]].T
        bound = None
    else:
        u1, v1 = _jitted("polynomial_factor", 1, 2)(problem, point["size"], point["factor"])
        bound = needed.row_error(point["size"], radius, point["factor"])
    k1 = u1.shape[1]
    # Rows are normalised as the chain normalises them, by the factor's own sums.
    u1 = u1 / (u1 @ v1.sum(0))[:, None]
    row_error = jnp.abs(u1 @ v1.T - true["f"]).sum(1).max()
    # Columns of zeros change nothing, and one width is compiled once.
    features = [math.comb(config.width + degree, degree) for degree in config.degrees]
    most = max([*config.ranks, *features])
    padded = (jnp.pad(x, ((0, 0), (0, most - k1))) for x in (u1, v1))
    table = _jitted("chain_errors")(problem, *padded)
    terms = {name: [float(e), float(limit), sizes[name]] for name, (e, limit) in table.items()}
    return {"terms": terms, "k1": k1, "row_error": float(row_error), "row_bound": bound}


@functools.cache
def _jitted(name: str, *static: int) -> Any:
    """A function of the chain, compiled once for all points."""
    module = chain_bounds if name == "chain_errors" else chain
    return jax.jit(getattr(module, name), static_argnums=static)


@functools.cache
def _prepare(
    gamma: float, shape: tuple[int, int, int, int], seed: int
) -> tuple[Any, dict[str, Any], dict[str, float], float]:
    """The problem of a gamma with the queries drawn, its dense terms, the largest entry of each term
    and gradient, and R.
    """
    length, rows, width, rank = shape
    sizes_of: dict[str, Any] = {"length": length, "width": width, "rank": rank}
    problem = ll.random_problem(jax.random.key(seed), **sizes_of, gamma=gamma, adapt=NAMES)
    drawn = np.random.default_rng(seed).choice(length, min(rows, length), replace=False)
    queries, target = problem.x_query[drawn], problem.target[drawn]
    problem = dataclasses.replace(problem, x_query=queries, target=target)
    true = exact.dense_terms(problem)
    sizes = {name: float(jnp.abs(true[name]).max()) for name in ("f", "c", "q", "p1", "p2", "p")}
    for name, adapter in exact.dense_gradient(problem)[1].items():
        sizes[f"{name}.a"] = float(jnp.abs(adapter.a).max())
        sizes[f"{name}.b"] = float(jnp.abs(adapter.b).max())
    return problem, true, sizes, float(jax.jit(ll.norm_report)(problem).score_bound)
