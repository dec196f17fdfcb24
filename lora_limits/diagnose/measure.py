"""One head, measured: norms, gradient errors by method, the cheapest at the tolerance, gradient
noise, norm needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.diagnose.heads import Head
from lora_limits.diagnose.times import Clock, predicted, run
from lora_limits.factors import Skeleton, SparseLowRank
from lora_limits.gradients.cost import exact_method
from lora_limits.gradients.exact import dense_terms
from lora_limits.gradients.methods import Polynomial
from lora_limits.instruments.comparing import frobenius_error, named
from lora_limits.method import Method
from lora_limits.norms import norm_report
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem

MOST_FEATURES = 8192
MOST_LONGER = 4096  # tokens of the windows laid end to end
RANKS = (64, 128)
ENTRIES = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 256))
HALVINGS, LEAST_SCALE = 6, 1 / 16  # of the search for the norm that a head would need
REPORTED = (
    "query",
    "key",
    "query_centred",
    "key_centred",
    "query_through_key",
    "x_key",
    "score_bound",
)

_norms = jax.jit(norm_report)


def ladder(width: int, length: int) -> dict[str, tuple[Method, ...]]:
    """The methods that are tried, by family, smallest first. Extended here and nowhere else.

    Polynomials of at most MOST_FEATURES features; skeletons and sparse plus low rank of at most
    half the tokens, those of all windows that are laid end to end.
    """
    return {
        "Polynomial": tuple(
            Polynomial(g) for g in range(1, 25) if monomials.count(width, g) <= MOST_FEATURES
        ),
        "Skeleton": tuple(Skeleton(k) for k in RANKS if 2 * k <= length),
        "SparseLowRank": tuple(SparseLowRank(t, k) for t, k in ENTRIES if 2 * (t + k) <= length),
    }


def label(method: Method) -> str:
    """A method as one would write it: Polynomial(3)."""
    told = [
        getattr(method, f.name)
        for f in dataclasses.fields(method)  # pyright: ignore[reportArgumentType]
        if f.default is dataclasses.MISSING or getattr(method, f.name) != f.default
    ]
    return f"{type(method).__name__}({', '.join(map(repr, told))})"


def norms(heads: Sequence[Head]) -> dict[str, float]:
    """The norm report of a head, largest over its windows, with its two ratios, raw and centred."""
    reports = [_norms(head.problem) for head in heads]
    out = {
        name: max(float(getattr(r, name)) for r in reports)
        for name in (*REPORTED, "score_bound_raw")
    }
    log = reports[0].threshold ** 2
    gamma = max(out["query"], out["key"])
    centred = max(out["query_centred"], out["key_centred"])
    return out | {
        "gamma": gamma,
        "gamma_centred": centred,
        "gamma_full": max(gamma, out["query_through_key"], out["x_key"]),
        "gamma_ratio": gamma / math.sqrt(log),
        "gamma_ratio_centred": centred / math.sqrt(log),
        "score_ratio": out["score_bound"] / log,
        "score_ratio_raw": out["score_bound_raw"] / log,
    }


Arrays = dict[str, np.ndarray]


def arrays(problem: LoRAProblem, method: Method) -> tuple[Arrays, int | None]:
    """({"query.a": gradient array, ...}, rank of the factor)."""
    result = run(problem, method=method)
    return named(result.gradient, dtype=None), result.rank


def error(got: Arrays, exact: Arrays) -> float:
    """Relative Frobenius error, the largest over the arrays; a gradient that is zero must come out
    as zero.
    """
    found = [frobenius_error(got[name], x) for name, x in exact.items()]
    return max(found) if all(map(math.isfinite, found)) else math.inf  # max alone would lose a NaN


def exact_arrays(problem: LoRAProblem) -> Arrays:
    """The exact gradient's arrays."""
    return arrays(problem, exact_method(problem))[0]


def climb(
    problems: Sequence[LoRAProblem], exact: Sequence[Arrays], tolerance: float, clock: Clock
) -> list[dict[str, Any]]:
    """Every method tried, family by family, smallest first, up to the first that is good enough:
    `within`.

    Good enough: within the tolerance in every window and, where it pays from longer texts only, on
    the windows laid end to end too, `error_longer` (None where it was not measured, or there is one
    window only).
    """
    tried = []
    width = problems[0].weights.query.shape[1]
    tokens = problems[0].x_query.shape[0]
    longer = None
    few = problems[: _joined(tokens)]
    for family, methods in ladder(width, tokens * len(few)).items():
        for method in methods:
            found = [arrays(p, method) for p in problems]
            worst = max(error(got, want) for (got, _), want in zip(found, exact, strict=True))
            step = {
                "family": family,
                "method": method,
                "rank": found[0][1],
                "error": worst,
                "error_longer": None,
            }
            step |= {"within": worst <= tolerance, "pays_from": None}
            tried.append(step)
            if worst > tolerance:
                continue
            step["pays_from"] = clock.pays_from(problems[0], method)
            if step["pays_from"] > tokens and len(few) > 1:
                longer = longer or _with_exact(laid_end_to_end(few))
                step["error_longer"] = error(arrays(longer[0], method)[0], longer[1])
                step["within"] = step["error_longer"] <= tolerance
            if step["within"]:
                break
    return tried


def _joined(tokens: int) -> int:
    """How many windows are laid end to end at most."""
    return max(1, MOST_LONGER // tokens)


def _with_exact(problem: LoRAProblem) -> tuple[LoRAProblem, Arrays]:
    return problem, exact_arrays(problem)


def noise(exact: Sequence[Arrays]) -> float | None:
    """Spread of the gradient from window to window over its root mean square: the noise of a
    mini-batch of one.

    sqrt(sum of variances / mean of squared norms), the smallest over the arrays; None for fewer
    than two windows.
    """
    if len(exact) < 2:
        return None
    least = math.inf
    for name in exact[0]:
        rows = np.stack([x[name].ravel() for x in exact]).astype(np.float64)
        square = float((rows**2).sum(1).mean())
        if square > 0:
            least = min(least, math.sqrt(float(rows.var(0, ddof=1).sum()) / square))
    return least if math.isfinite(least) else None


def _frozen(problem: LoRAProblem) -> LoRAProblem:
    return dataclasses.replace(problem, adapters=jax.tree.map(jnp.zeros_like, problem.adapters))


@jax.jit
def cooled(problem: LoRAProblem, factor: jax.Array) -> LoRAProblem:
    """The head with Q and K scaled by `factor`, beta that is by its square, and the target moved
    along: same noise.
    """
    frozen = _frozen(problem)
    other = dataclasses.replace(frozen, beta=problem.beta * factor**2)
    moved = dense_terms(other)["c"] - dense_terms(frozen)["c"]
    return dataclasses.replace(problem, beta=other.beta, target=problem.target + moved)


@jax.jit
def _noise_of_target(problem: LoRAProblem) -> jax.Array:
    return -dense_terms(_frozen(problem))["c"]


def laid_end_to_end(problems: Sequence[LoRAProblem]) -> LoRAProblem:
    """The head on its windows as one text: nothing that the model itself computes.

    Every query sees the keys of every window; the target is the frozen head's output there plus the
    windows' noise.
    """
    rows = {
        n: jnp.concatenate([getattr(p, n) for p in problems])
        for n in ("x_query", "x_key", "x_value")
    }
    noise = jnp.concatenate([_noise_of_target(p) for p in problems])
    long = dataclasses.replace(problems[0], **rows, target=noise)
    return dataclasses.replace(long, target=2 * noise - _noise_of_target(long))


def scale_needed(problems: Sequence[LoRAProblem], method: Method, tolerance: float) -> float | None:
    """The largest factor on Q and K, 1 at most, with which the method is within the tolerance; None
    below 1/16.

    By halving log(factor) HALVINGS times, every window each time.
    """

    def fits(factor: float) -> bool:
        for problem in problems:
            cool = cooled(problem, jnp.asarray(factor, problem.dtype))
            if error(arrays(cool, method)[0], exact_arrays(cool)) > tolerance:
                return False
        return True

    if fits(1.0):
        return 1.0
    low = math.log(LEAST_SCALE)
    high = 0.0
    if not fits(math.exp(low)):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(math.exp(middle)) else (low, middle)
    return math.exp(low)


def affordable(problem: LoRAProblem, clock: Clock) -> tuple[Method, int]:
    """(polynomial, length from which it pays): the highest degree that pays at this length, else
    the first.

    Polynomials, since theirs is the norm bound of the theorems. A degree pays only where those
    below it do: one lucky time does not carry it over the exact gradient.
    """
    tokens = problem.x_query.shape[0]
    first, *higher = ladder(problem.weights.query.shape[1], tokens)["Polynomial"]
    best = first
    pays = clock.pays_from(problem, first)
    for method in higher if pays <= tokens else ():
        if clock.pays_from(problem, method) > tokens:
            break
        best = method
    return best, pays


def measure_head(heads: Sequence[Head], clock: Clock, tolerance: float) -> dict[str, Any]:
    """Errors, verdict, times and noise of one head over its windows, as JSON holds them. heads: the
    head by window.
    """
    problems = [head.problem for head in heads]
    exact = [exact_arrays(p) for p in problems]
    tried = climb(problems, exact, tolerance, clock)
    best: dict[str, Any] | None = min(
        (t for t in tried if t["within"]), key=lambda t: t["pays_from"], default=None
    )
    shown: dict[str, Any] = best or min(tried, key=lambda t: t["error"])
    tokens = problems[0].x_query.shape[0]
    mine, theirs = clock.pair(problems[0], shown["method"])
    ratio = predicted(problems[0], shown["method"])
    dial, dial_from = affordable(problems[0], clock)
    return {
        "tried": [t | {"method": label(t["method"])} for t in tried],
        "method": label(shown["method"]),
        "rank": shown["rank"],
        "error": shown["error"],
        "error_longer": shown["error_longer"],
        "verdict": "never" if best is None else "now" if best["pays_from"] <= tokens else "later",
        "pays_from": best and best["pays_from"],
        "seconds": {"method": mine, "exact": theirs, "predicted": ratio and ratio * theirs},
        "noise": noise(exact),
        "dial": {
            "method": label(dial),
            "pays_from": dial_from,
            "scale": scale_needed(problems, dial, tolerance),
        },
    }
