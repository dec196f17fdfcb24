"""A gradient of tokens that are read from a file chunk by chunk: its time, and its error."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import lora_limits as ll
from experiments.contenders import sampled_degrees
from experiments.problems import boxes, token_files
from lora_limits.instruments.comparing import certified_share
from lora_limits.instruments.timing import median_time

ROWS = 64  # queries drawn for the error
PILOT = 8192  # tokens of the exact gradient that the whole one is extrapolated from


def measured(
    length: int, width: int, degree: int, *, rank: int, gamma: float, repeats: int
) -> dict[str, Any]:
    """{"features", "seconds", "bound", "error", "spread", "arrays", "exact_seconds", "file_bytes"}.

    In double precision, one run, compiling included. bound: what is certified of it, the largest
    bound of an array over its largest entry. error: of the worst array, from ROWS queries;
    for it alone the tokens are in memory. exact_seconds: counted, those of PILOT tokens times
    (L / PILOT)^2.
    """
    named = {"rank": rank, "gamma": gamma}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.npy")
        token_files.write(path, 0, length=length, width=width)
        start = time.perf_counter()
        result = ll.streamed_gradient(token_files.chunks(path, 0, **named), ll.Polynomial(degree))
        jax.block_until_ready((result.gradient, result.bound))
        seconds = time.perf_counter() - start
        scan = sampled_degrees.scan(
            token_files.whole(path, 0, **named), highest=max(degree, 2), rows=ROWS
        )
    worst, spread = scan.worst()
    return {
        "features": result.rank,
        "seconds": seconds,
        "bound": certified_share(result),
        "error": float(worst[degree]),
        "spread": float(spread[degree]),
        "arrays": {name: float(errors[degree]) for name, errors in scan.errors.items()},
        "exact_seconds": _exact_seconds(length, width, named, repeats),
        "file_bytes": 4 * length * width,
    }


def _exact_seconds(length: int, width: int, named: dict[str, Any], repeats: int) -> float:
    tokens = min(PILOT, length)
    pilot = boxes.problem("uniform", 0, length=tokens, width=width, **named)
    exact = jax.jit(lambda p: ll.gradient(p, ll.Exact(min(1024, tokens))).gradient)
    took = median_time(exact, pilot, repeats=repeats, max_seconds=10.0)
    return took["seconds"] * (length / tokens) ** 2
