"""What the theorems ask of the norms: Gamma against sqrt(log L), beta, and what controls them."""

from __future__ import annotations

import math

import numpy as np

from lora_limits.instruments.comparing import max_error as relative
from lora_limits.instruments.compiling import quick_jit
from lora_limits.ledger.row import FULL, Evidence, problem, terms
from lora_limits.norms import norm_report
from lora_limits.polynomial import needed
from lora_limits.problem import inputs, project


def transition() -> Evidence:
    """log k / log L, counted at L = 2^32 with d = log2 L, tolerance 1/L and beta = 1/d.

    Gamma = kappa sqrt(ln L), so that R = kappa^2 ln L.
    """
    # Counting touches no token, so L may be far beyond what a computer holds.
    log_length = 32 * math.log(2)
    out = {}
    for kappa in (0.2, 1.0, 2.0):
        degree = needed.degree_needed(kappa**2 * log_length, 2.0**-32)
        out[kappa] = needed.width_exponent(32, degree, log_length)
    text = ", ".join(f"{value:.2f} at kappa = {kappa}" for kappa, value in out.items())
    return Evidence(f"log k / log L, counted to 2^32: {text}", out[0.2] < 1 < out[1.0] < out[2.0])


def norm_conditions() -> Evidence:
    """The norm report against the norms of Q, K and s X B A, and its R against the scores."""
    p = problem(FULL)
    t = terms(p)
    report = quick_jit(norm_report)(p)
    got = [float(x) for x in (report.query, report.key, report.query_update)]
    a = p.adapters["query"]
    want = [np.abs(x).max() for x in (t["Q"], t["K"], p.scale * p.x_query @ a.b @ a.a)]
    radius = float(np.abs(p.beta * t["Q"] @ t["K"].T).max())
    # the problem has 24 tokens
    ratio = float(report.gamma) / math.sqrt(math.log(24))
    error = relative(got, want)
    holds = error < 1e-12 and float(report.score_bound_raw) >= radius
    return Evidence(f"relative error {error:.1e}; Gamma / sqrt(ln L) = {ratio:.2f}", holds)


def norm_control() -> Evidence:
    """Layer norm before the projections bounds X alone: Gamma grows with the adapters.

    After them, on queries and keys, it bounds R.
    """
    rng = np.random.default_rng(9)
    x, w, b, a = (rng.normal(size=shape) for shape in ((24, 16), (16, 8), (16, 2), (2, 8)))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    # rows of the same projection with adapters of two sizes, as they are and normalised
    rows = [x @ (w + size * b @ a) for size in (1.0, 100.0)]
    gamma = [float(np.abs(z).max()) for z in rows]
    normed = [z / np.sqrt((z**2).mean(1, keepdims=True)) for z in rows]
    radius = [float(np.abs(z @ z.T).max()) / math.sqrt(8) for z in normed]
    text = f"adapters 100 times larger: Gamma {gamma[1] / gamma[0]:.0f} times; "
    text += f"R = sqrt(d) = {radius[1]:.2f} normalised"
    return Evidence(text, gamma[1] > 50 * gamma[0] and max(radius) <= math.sqrt(8) * (1 + 1e-12))


def wrong_inverse_temperature() -> Evidence:
    """(S4): with beta = 1 the same Gamma gives scores d times larger.

    So the width that an error of 1/L needs is another power of L.
    """
    width = 32
    log_length = 32 * math.log(2)
    gamma = 0.8
    p = problem()
    q, k = (np.asarray(project(p, n, inputs(p)[n])) for n in ("query", "key"))
    # d = 3: the scores without beta beside those with it
    measured = np.abs(q @ k.T).max() / np.abs(p.beta * q @ k.T).max()
    pair = []
    for radius in (gamma**2, gamma**2 * width):
        degree = needed.degree_needed(radius, 2.0**-32)
        pair.append(needed.width_exponent(width, degree, log_length))
    text = f"R {measured:.0f} = d times larger; Gamma = 0.8, L = 2^32: "
    text += f"log k / log L {pair[0]:.2f} -> {pair[1]:.2f}"
    return Evidence(text, abs(measured - 3) < 1e-9 and pair[0] < 1 < pair[1])
