"""One head, measured: norms, errors by method, the cheapest that is good enough, noise, dials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_limits.diagnose.errors import exact_arrays, noise
from lora_limits.diagnose.heads import Head, Scores
from lora_limits.diagnose.methods import affordable, climb, label, scale_needed
from lora_limits.diagnose.times import Clock
from lora_limits.norms import NormReport, norm_report
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem

REPORTED = ("query", "key", "query_centred", "key_centred", "score_bound", "score_bound_raw")

_norms = jax.jit(norm_report)


def _report(scores: Scores) -> NormReport:
    """The norms of queries and keys as they meet, positions applied."""
    q, k = (jnp.asarray(x, jnp.float32) for x in (scores.query, scores.key))
    width = q.shape[1]
    eye = jnp.eye(width, dtype=jnp.float32)
    none = Adapter(jnp.zeros((1, width), jnp.float32), jnp.zeros((width, 1), jnp.float32))
    problem = LoRAProblem(
        q,
        k,
        k,
        jnp.zeros_like(q),
        weights=AttentionWeights(eye, eye, eye),
        adapters={"value": none},
        scale=jnp.float32(1),
        beta=jnp.float32(scores.scale),
    )
    return _norms(problem)


def norms(scores: Sequence[Scores]) -> dict[str, float]:
    """The norms of a head, largest over its windows, with its two ratios, raw and centred."""
    reports = [_report(window) for window in scores]
    out = {name: max(float(getattr(r, name)) for r in reports) for name in REPORTED}
    # all windows have the same L
    log = math.log(len(scores[0].query))
    gamma = max(out["query"], out["key"])
    centred = max(out["query_centred"], out["key_centred"])
    return out | {
        "gamma": gamma,
        "gamma_centred": centred,
        "gamma_ratio": gamma / math.sqrt(log),
        "gamma_ratio_centred": centred / math.sqrt(log),
        "score_ratio": out["score_bound"] / log,
        "score_ratio_raw": out["score_bound_raw"] / log,
    }


def _verdict(best: dict[str, Any] | None, tokens: int) -> str:
    """Of the cheapest method that is good enough, at the length of the windows."""
    if best is None:
        return "never"
    return "now" if best["pays_from"] <= tokens else "later"


def measure_head(heads: Sequence[Head], clock: Clock, tolerance: float) -> dict[str, Any]:
    """Errors, verdict, times and noise of one head over its windows, as JSON holds them.

    heads: the head by window. Times are those of the first window, whose shape all share.
    """
    problems = [head.problem for head in heads]
    first = problems[0]
    tokens = first.x_query.shape[0]
    exact = [exact_arrays(p) for p in problems]
    tried = climb(problems, exact, tolerance, clock)
    within = [t for t in tried if t["within"]]
    best: dict[str, Any] | None = min(within, key=lambda t: t["pays_from"], default=None)
    # Where nothing is good enough the most accurate is shown.
    shown: dict[str, Any] = best or min(tried, key=lambda t: t["error"])
    mine, theirs = clock.pair(first, shown["method"])
    dial, dial_from = affordable(first, clock)
    return {
        "tried": [t | {"method": label(t["method"])} for t in tried],
        "method": label(shown["method"]),
        "rank": shown["rank"],
        "error": shown["error"],
        "error_longer": shown["error_longer"],
        "verdict": _verdict(best, tokens),
        "pays_from": best and best["pays_from"],
        "basis": best and best["basis"],
        "seconds": {"method": mine, "exact": theirs},
        "noise": noise(exact),
        "dial": {
            "method": label(dial),
            "pays_from": dial_from,
            "scale": scale_needed(problems[0], dial, tolerance),
        },
    }
