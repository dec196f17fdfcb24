"""Decisions through approximate gradients: who answers right as Gamma and k shrink, and what the
quadrature costs.

Every oracle sees the same nearest-neighbour instances (lora_limits.hardness) through the readout
decider, and nothing of them but LoRA problems. Families:

exact        the library's exact gradient
polynomial   the library's Polynomial(degree), Taylor
chebyshev    exp replaced by its degree-g Chebyshev interpolant on the range of S, whose k is
             binom(d + 1 + g, g), d + 1 being the rank of S
columns      f projected on the span of k of its columns drawn uniformly: no factor built on those
             keys is nearer to f
svd          f of rank k by its singular value decomposition: no factor of that
             width is nearer at all

The last three are dense stand-ins for f: they bound what a fast method of that k could answer. Rows
are normalised after the replacement, and the gradient is that of Lemma 3.2 with the new f in place
of f.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders.stand_ins import chebyshev, columns, dense_gradient, truncated
from experiments.runner.config import Fields
from lora_limits import hardness
from lora_limits.hardness import instances as generators
from lora_limits.hardness.deciders import PATH_SLACK, QUADRATURE_SHARE, READOUT_SLACK
from lora_limits.hardness.gadgets import score_range

Family = Literal["exact", "polynomial", "chebyshev", "columns", "svd"]
MAKERS = {
    "random": generators.random_neighbours,
    "clustered": generators.clustered_neighbours,
}
VERSION = 1
X64 = True
POINTS = (
    "lengths",
    "strengths",
    "families",
    "degrees",
    "library_degrees",
    "column_counts",
    "ranks",
    "spectral_limit",
    "library_limit",
    "quadrature_lengths",
)


# The narrowest gadget has room for a gap of 1.
Points = Annotated[int, Field(ge=4)]


class Config(Fields):
    """lengths: n. strengths: Gamma over the Gamma the gadget needs. instances: for each answer and
    kind of instance.

    families: which oracles, at each of the sizes of their own: library_degrees (polynomial),
    degrees (chebyshev), column_counts, ranks (svd). spectral_limit: the largest n for columns and
    svd, which cost O(L^3); library_limit: the same for the library's polynomial.
    quadrature_lengths: n for the quadrature panel.
    """

    lengths: tuple[Points, ...]
    strengths: tuple[PositiveFloat, ...]
    instances: PositiveInt
    families: tuple[Family, ...]
    degrees: tuple[PositiveInt, ...]
    library_degrees: tuple[PositiveInt, ...]
    column_counts: tuple[PositiveInt, ...]
    ranks: tuple[PositiveInt, ...]
    spectral_limit: PositiveInt
    library_limit: PositiveInt
    quadrature_lengths: tuple[Points, ...]
    distance: int = Field(default=2, ge=0)


def points(config: Config) -> list[dict[str, Any]]:
    """Decisions by length, family, size and strength; then one quadrature comparison for each
    length.
    """
    out: list[dict[str, Any]] = []
    for n in config.lengths:
        for family in config.families:
            for size in _sizes(config, family, n):
                oracle = {"panel": "decision", "n": n, "family": family, "size": size}
                out += [oracle | {"strength": strength} for strength in config.strengths]
    return out + [{"panel": "quadrature", "n": n} for n in config.quadrature_lengths]


def _sizes(config: Config, family: str, n: int) -> tuple[int, ...]:
    if family == "exact":
        return (0,)
    if family == "polynomial":
        return config.library_degrees if n <= config.library_limit else ()
    if family == "chebyshev":
        return config.degrees
    sizes = config.ranks if family == "svd" else config.column_counts
    return tuple(k for k in sizes if k <= 2 * n) if n <= config.spectral_limit else ()


def shape(n: int) -> tuple[int, int]:
    """(width, gap): d = 6 log2 n and Delta = d / 8, so that R / ln n is a constant."""
    width = round(6 * math.log2(n))
    return width, width // 8


def instances(n: int, config: Config) -> Iterator[tuple[str, bool, Any, Any]]:
    """(kind, answer, a, b), the same for every oracle and strength."""
    width, gap = shape(n)
    for number in range(config.instances):
        for index, (kind, make) in enumerate(MAKERS.items()):
            for answer in (True, False):
                # The seed names the instance alone: no oracle sees an easier one.
                rng = np.random.default_rng([n, number, index, answer])
                a, b = make(rng, n, width, config.distance, gap, answer)
                yield kind, answer, a, b


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The share of right answers of one oracle at one strength, or the errors of the quadratures at
    one n.
    """
    if point["panel"] == "quadrature":
        return _quadrature(point["n"], config)
    return _decisions(point, config)


def _decisions(point: dict[str, Any], config: Config) -> dict[str, Any]:
    n = point["n"]
    width, gap = shape(n)
    oracle, k = make_oracle(point["family"], point["size"], n)
    right: dict[str, list[bool]] = {kind: [] for kind in MAKERS}
    calls, beta0, decision = 0, 0.0, None
    for kind, answer, a, b in instances(n, config):
        gadget = hardness.hamming_gadget(a, b, config.distance, gap)
        # Scores grow as the square of Gamma, which is the strength's unit.
        beta0 = point["strength"] ** 2 * hardness.inverse_noise(gadget, READOUT_SLACK)
        decision = hardness.decide_by_readout(gadget, oracle, beta0=beta0)
        right[kind].append(bool(decision) is answer)
        calls += decision.calls
    assert decision is not None
    pooled = [x for answers in right.values() for x in answers]
    return {
        "right": float(np.mean(pooled)),
        "decisions": len(pooled),
        **{f"right_{kind}": float(np.mean(answers)) for kind, answers in right.items()},
        "k": k,
        "tokens": decision.tokens,
        "width": width,
        "calls": calls,
        "gamma_ratio": math.sqrt(width * beta0 / math.log(n)),
        "score_ratio": decision.score_bound / math.log(n),
    }


def _quadrature(n: int, config: Config) -> dict[str, Any]:
    width, gap = shape(n)
    kind, answer, a, b = next(x for x in instances(n, config) if not x[1])
    gadget = hardness.hamming_gadget(a, b, config.distance, gap)
    beta0 = hardness.inverse_noise(gadget, PATH_SLACK)
    # What the path integral comes to, in closed form: the noise of the quadrature is measured
    # against it.
    odds = np.exp(beta0 * (gadget.queries @ gadget.keys.T - gadget.level)).sum(1)
    truth = ((odds / (1 + odds)) ** 2).sum() - n * (n / gadget.tokens) ** 2
    oracle = hardness.gradient_oracle()

    def problem_at(lam: float) -> ll.LoRAProblem:
        return hardness.path_problem(gadget, beta0, lam)

    def error(nodes: int, rule: Callable[..., float]) -> float:
        return abs(hardness.path_integral(problem_at, oracle, nodes, rule) - truth)

    # The paper's choice: (ln n)^4 nodes of the left rule.
    published = math.ceil(math.log(n) ** 4)
    return {
        "kind": kind,
        "answer": answer,
        "width": width,
        "left_riemann_nodes": published,
        "left_riemann": error(published, hardness.left_riemann),
        **{f"gauss_{nodes}": error(nodes, hardness.gauss_legendre) for nodes in (12, 16, 24)},
        "certified_nodes": hardness.nodes_needed(n, score_range(gadget, beta0), QUADRATURE_SHARE),
    }


def make_oracle(
    family: str, size: int, n: int
) -> tuple[Callable[[Any], dict[str, Any]], int | None]:
    """(oracle, k). k is None for an exact gradient."""
    width, _ = shape(n)
    if family == "exact":
        return hardness.gradient_oracle(), None
    if family == "polynomial":
        # S has rank d + 1, but the tokens carry it in 2 d + 1 coordinates: those are what the
        # features are made of.
        return hardness.gradient_oracle(ll.Polynomial(size)), math.comb(2 * width + 1 + size, size)
    if family == "chebyshev":
        k = math.comb(width + 1 + size, size)
        return (lambda p: dense_gradient(p, lambda s: chebyshev(s, size))), k
    stand_in = columns if family == "columns" else truncated
    return (lambda p: dense_gradient(p, lambda s: stand_in(s, size))), size
