"""One cell of the map of the phase boundary: a problem of a family, and the degrees that it needs."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from experiments.contenders import sampled_degrees
from experiments.contenders.needed_degrees import needed
from experiments.problems import boxes
from lora_limits.polynomial.needed import width_exponent

HIGHEST = 32  # no degree above it is measured
MOST_EXPONENT = 1.6  # nor one whose features are more than L to this power


def tolerances(length: int) -> dict[str, float]:
    """Theorem 3.1 asks for 1 / poly(L); training is content with a percent."""
    return {"1/L": 1 / length, "1%": 0.01}


def highest(length: int, width: int) -> int:
    """The last degree that is measured."""
    most = MOST_EXPONENT * math.log(length)
    enough = (g for g in range(4, HIGHEST) if width_exponent(width, g, 1.0) >= most)
    return next(enough, HIGHEST)


def measured(point: dict[str, Any], *, rank: int, rows: int) -> dict[str, Any]:
    """What a cell of the map holds: its norms, and by tolerance the degrees and features needed.

    point: family, seed, length, width, gamma; rank, where it has one, before the rank given. rows:
    queries drawn. "errors", "spread": of the worst array, by degree, with the standard error.
    """
    family, length, width = point["family"], point["length"], point["width"]
    problem = boxes.problem(
        family,
        point["seed"],
        length=length,
        width=width,
        rank=point.get("rank", min(rank, width)),
        gamma=point["gamma"],
    )
    scan = sampled_degrees.scan(
        problem,
        highest=highest(length, width),
        rows=rows,
        noise=boxes.noise(family),
        key=jax.random.key(point["seed"]),
        alike=family == boxes.GADGET,
    )
    worst, spread = scan.worst()
    bound = point["gamma"] ** 2
    out: dict[str, Any] = {
        "score_bound": bound,
        "score_ratio": bound / math.log(length),
        "gamma_ratio": point["gamma"] / math.sqrt(math.log(length)),
        "score_rms": scan.score,
        "normaliser": _short(scan.normaliser[1:].min()),
    }
    for name, tolerance in tolerances(length).items():
        need = functools.partial(needed, tolerance=tolerance, width=width, length=length)
        arrays = {array: need(list(errors))["degree"] for array, errors in scan.errors.items()}
        out[name] = need(list(worst)) | {"arrays": arrays}
    # what lies beyond the degree that the stricter tolerance needs is not read
    degree = out["1/L" if 1 / length < 0.01 else "1%"]["degree"]
    last = len(worst) if degree is None else degree + 3
    return out | {
        "errors": [_short(x) for x in worst[:last]],
        "spread": [_short(x) for x in spread[:last]],
    }


def _short(x: Any) -> float:
    """Three digits: what is below is noise of the draws, and there are many rows."""
    return float(f"{float(x):.3g}")
