"""What the theorems ask of the norms: Gamma against sqrt(log L), beta, and what controls them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lora_limits.gradients.methods import Polynomial
from lora_limits.gradients.solve import gradient
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.instruments.compiling import quick_jit
from lora_limits.ledger.row import FULL, Evidence, exact_gradient, problem, terms
from lora_limits.norms import norm_report
from lora_limits.polynomial import needed
from lora_limits.problem import inputs, project


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


def far_above() -> Evidence:
    """Rem. 5.2 reads the conditions as necessary: a problem that breaks them and is easy.

    A shift of all keys leaves f and the gradient as they are, and makes Gamma as large as one likes.
    """
    p = problem(FULL, length=256, gamma=0.7)
    large = 100 * math.sqrt(math.log(256))
    shifted = dataclasses.replace(p, x_key=p.x_key + large)
    gamma = float(quick_jit(norm_report)(shifted).gamma_full)
    # all of them of the shifted problem, but for the value adapter, which sees no key
    solve = quick_jit(gradient, static_argnums=1)
    got, want = solve(shifted, Polynomial(5)).gradient, exact_gradient(shifted)
    error = max(relative(got[n].a, want[n].a) for n in ("query", "value"))
    text = f"Gamma {gamma:.0f} = {gamma / math.sqrt(math.log(256)):.0f} sqrt(ln L): "
    text += f"degree 5 errs by {error:.0e}, 1/L = {1 / 256:.0e}"
    return Evidence(text, gamma > large / 2 and error < 1 / 256)
