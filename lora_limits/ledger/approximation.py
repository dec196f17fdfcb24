"""The almost linear algorithm: Lemmas 3.3 to 3.7 and D.5 to D.9, Theorems 3.1 and A.1, and the
remarks around them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_limits.gradients import chain
from lora_limits.gradients.chain_bounds import chain_errors
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.ledger.exactness import COUNTED, chain_operations, exponent
from lora_limits.ledger.row import FULL, Evidence, Row, exact_gradient, problem, terms
from lora_limits.norms import norm_report
from lora_limits.polynomial import needed
from lora_limits.problem import inputs, project

DEGREE = 4
LENGTH = 256
LEMMAS = "tests/gradients/test_chain.py::test_every_lemma_holds_within_its_bound"
CROSS = "tests/gradients/test_chain.py::test_every_lemma_holds_in_cross_attention"
ROW_ERROR = "tests/gradients/test_chain.py::test_the_row_error_of_lemma_3_3_holds"
WIDTHS = (
    "tests/gradients/test_chain.py::test_terms_are_products_of_their_factors_with_the_stated_widths"
)
FALLS = "tests/gradients/test_chain.py::test_the_error_falls_with_the_degree"
COUNTING = "tests/ledger/test_theorems.py::test_the_exponent_crosses_over_at_sqrt_log_length"


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """jax.jit with little optimisation: these programs compile for longer than they run."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(
        function, compiler_options=quick if jax.default_backend() == "cpu" else None, **options
    )


@functools.cache
def factor(keys: int = 0, length: int = 24, gamma: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """U1, V1 of the chain of degree 4 on `problem(FULL, length, keys, gamma)`."""
    return compiled(chain.polynomial_factor, static_argnums=1)(
        problem(FULL, length, keys, gamma), DEGREE
    )


@functools.cache
def errors(keys: int = 0) -> dict[str, tuple[float, float]]:
    """{term: (error, bound)} of the chain of degree 4."""
    table = compiled(chain_errors)(problem(FULL, keys=keys), *factor(keys))
    return {name: (float(error), float(bound)) for name, (error, bound) in table.items()}


def lemma(term: str, keys: int = 0, note: str = "") -> Evidence:
    """One line of the chain: its error and its bound. keys: Lk where keys have inputs of their
    own.
    """
    error, bound = errors(keys)[term]
    return Evidence(f"error {error:.1e} <= bound {bound:.1e}{note}", error <= bound)


def lemma_3_3(keys: int = 0) -> Evidence:
    u1, v1 = (np.asarray(x) for x in factor(keys))
    t = terms(problem(FULL, keys=keys))
    delta = float(np.abs(u1 @ v1.T - t["f"]).sum(1).max())
    centred = t["Q"] - t["Q"].mean(0)
    weights = np.exp(t["K"] @ t["Q"].mean(0) / 3)
    radius = float(np.abs(centred @ (t["K"] - weights @ t["K"] / weights.sum()).T).max()) / 3
    bound = needed.row_error(DEGREE, radius)
    width = math.comb(3 + DEGREE, DEGREE)
    return Evidence(
        f"row error {delta:.1e} <= {bound:.1e}; k1 = {width}",
        delta <= bound and u1.shape[1] == width,
    )


def lemma_3_5(keys: int = 0) -> Evidence:
    t = chain.chain_terms(problem(FULL, keys=keys), *factor(keys))
    return lemma("q", keys, f"; k2 = {t.u2.shape[1]} = d")


def lemma_3_6(keys: int = 0) -> Evidence:
    t = chain.chain_terms(problem(FULL, keys=keys), *factor(keys))
    return lemma("p1", keys, f"; k3 = {t.u3.shape[1]} = k1 k2")


def lemma_3_7(keys: int = 0) -> Evidence:
    """Corrected: U4 = diag(rho) U1; as printed the diagonal sits on V1, which needs Lq = Lk."""
    return lemma("p2", keys)


def approximable(names: tuple[str, ...], gamma: float = 0.7) -> Evidence:
    """The chain against the exact gradient at L = 256, within 1/L in max norm, through k1 << L."""
    p = problem(FULL, LENGTH, gamma=gamma)
    got = compiled(chain.chain_gradient)(p, *factor(0, LENGTH, gamma))[1]
    want = exact_gradient(p)
    pairs = [(getattr(got[n], half), getattr(want[n], half)) for n in names for half in ("a", "b")]
    worst, top = (max(float(np.abs(x - size * y).max()) for x, y in pairs) for size in (1, 0))
    width = factor(0, LENGTH, gamma)[0].shape[1]
    slope = exponent(chain_operations)
    text = f"error {worst:.0e} of entries to {top:.0f}, 1/L = {1 / LENGTH:.0e}; k1 = {width}; time ~ L^{slope:.2f}"
    return Evidence(text, worst <= 1 / LENGTH and width < LENGTH / 4 and slope < 1.05)


def linear_time() -> Evidence:
    slope = exponent(chain_operations)
    return Evidence(f"operations of the chain at fixed k1 ~ L^{slope:.2f}", slope < 1.05)


def transition() -> Evidence:
    """log k / log L, counted at L = 2^32 with d = log2 L, tolerance 1/L, Gamma = kappa sqrt(ln L),
    beta = 1/d.
    """
    log_length = 32 * math.log(2)
    out = {}
    for kappa in (0.2, 1.0, 2.0):
        degree = needed.degree_needed(kappa**2 * log_length, 2.0**-32)
        out[kappa] = needed.width_exponent(32, degree, log_length)
    text = ", ".join(f"{value:.2f} at kappa = {kappa}" for kappa, value in out.items())
    return Evidence(f"log k / log L, counted to 2^32: {text}", out[0.2] < 1 < out[1.0] < out[2.0])


def norm_conditions() -> Evidence:
    p = problem(FULL)
    t = terms(p)
    report = compiled(norm_report)(p)
    got = [float(x) for x in (report.query, report.key, report.query_update)]
    a = p.adapters["query"]
    want = [np.abs(x).max() for x in (t["Q"], t["K"], p.scale * p.x_query @ a.b @ a.a)]
    radius = float(np.abs(p.beta * t["Q"] @ t["K"].T).max())
    ratio = float(report.gamma) / math.sqrt(math.log(24))
    error = relative(got, want)
    holds = error < 1e-12 and float(report.score_bound_raw) >= radius
    return Evidence(f"relative error {error:.1e}; Gamma / sqrt(ln L) = {ratio:.2f}", holds)


def norm_control() -> Evidence:
    """Layer norm before the projections bounds X alone: Gamma grows with the adapters. After them
    it bounds R.
    """
    rng = np.random.default_rng(9)
    x, w, b, a = (rng.normal(size=shape) for shape in ((24, 16), (16, 8), (16, 2), (2, 8)))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    rows = [x @ (w + size * b @ a) for size in (1.0, 100.0)]
    gamma = [float(np.abs(z).max()) for z in rows]
    normed = [z / np.sqrt((z**2).mean(1, keepdims=True)) for z in rows]
    radius = [float(np.abs(z @ z.T).max()) / math.sqrt(8) for z in normed]
    text = f"adapters 100 times larger: Gamma {gamma[1] / gamma[0]:.0f} times; R = sqrt(d) = {radius[1]:.2f} normalised"
    return Evidence(text, gamma[1] > 50 * gamma[0] and max(radius) <= math.sqrt(8) * (1 + 1e-12))


def both_attentions() -> Evidence:
    pair = [max(error / bound for error, bound in errors(keys).values()) for keys in (0, 17)]
    return Evidence(
        f"largest error / bound: self {pair[0]:.2f}, cross {pair[1]:.2f}", max(pair) <= 1
    )


def wrong_inverse_temperature() -> Evidence:
    """(S4): with beta = 1 the same Gamma gives scores d times larger, so the width that 1/L needs
    is another power.
    """
    width = 32
    log_length = 32 * math.log(2)
    gamma = 0.8
    p = problem()
    q, k = (np.asarray(project(p, n, inputs(p)[n])) for n in ("query", "key"))
    measured = np.abs(q @ k.T).max() / np.abs(p.beta * q @ k.T).max()
    pair = []
    for radius in (gamma**2, gamma**2 * width):
        pair.append(
            needed.width_exponent(width, needed.degree_needed(radius, 2.0**-32), log_length)
        )
    text = f"R {measured:.0f} = d times larger; Gamma = 0.8, L = 2^32: log k / log L {pair[0]:.2f} -> {pair[1]:.2f}"
    return Evidence(text, abs(measured - 3) < 1e-9 and pair[0] < 1 < pair[1])


def pairs_of_lemmas() -> tuple[Row, ...]:
    """Lemmas 3.3 to 3.7, and D.5 to D.9 for queries and keys with inputs of their own."""
    out = []
    for lemma_number, appendix, statement, verdict, check, test in (
        ("3.3", "D.5", "f ~ U1 V1^T of width k1 = binom(d + g, g)", "holds", lemma_3_3, ROW_ERROR),
        ("3.4", "D.6", "c ~ U1 (V1^T C3) - Y", "holds", functools.partial(lemma, "c"), LEMMAS),
        (
            "3.5",
            "D.7",
            "q ~ U2 V2^T of width k2 = d, not 2 d",
            "holds as corrected",
            lemma_3_5,
            WIDTHS,
        ),
        ("3.6", "D.8", "p1 ~ U3 V3^T, row-wise Kronecker products", "holds", lemma_3_6, LEMMAS),
        ("3.7", "D.9", "p2 ~ U4 V4^T, U4 = diag(rho) U1", "holds as corrected", lemma_3_7, LEMMAS),
    ):
        out.append(Row(f"Lemma {lemma_number}", statement, verdict, check, test, "chain_errors"))
        cross = functools.partial(check, keys=17)
        where = f"{statement}; queries and keys apart"
        out.append(Row(f"Lemma {appendix}", where, verdict, cross, CROSS, "chain_errors"))
    return tuple(out)


PART = ("query",)
WHOLE = ("query", "key")
ROWS = (
    *pairs_of_lemmas(),
    Row(
        "Theorem 3.1",
        "partial case: Gamma = o(sqrt(log L)) makes both gradients approximable in L^{1+o(1)}, beta = 1/d",
        "holds as corrected",
        lambda: approximable(PART),
        FALLS,
        "rates",
    ),
    Row(
        "Theorem A.1",
        "full case: the same for A and B of queries and keys",
        "holds as corrected",
        lambda: approximable(WHOLE),
        FALLS,
        "rates",
    ),
    Row(
        "Theorem 1.2",
        "informal Theorems 3.1 and A.1",
        "holds as corrected",
        lambda: approximable(FULL),
        FALLS,
        "rates",
    ),
    Row(
        "Rem. 3.1",
        "the low-rank form makes almost linear time possible",
        "holds",
        linear_time,
        COUNTED,
        "rates",
    ),
    Row(
        "Rem. 4.1",
        "a phase transition in Gamma at sqrt(log L)",
        "holds",
        transition,
        COUNTING,
        "rates",
    ),
    Row(
        "Rem. 5.2",
        "norm conditions a practitioner can measure",
        "definition",
        norm_conditions,
        "tests/ledger/test_theorems.py::test_norms_are_those_of_the_theorems",
        "crossing",
    ),
    Row(
        "Rem. 5.2, control",
        "layer norm before the projections controls the norms; right: after them, on queries and keys",
        "holds as corrected",
        norm_control,
        "tests/test_norm_control.py::"
        "test_query_key_normalisation_bounds_the_scores_whatever_the_adapters_and_layer_norm_does_not",
        "crossing",
    ),
    Row(
        "Rem. 5.3",
        "all of it in self- and cross-attention",
        "holds",
        both_attentions,
        CROSS,
        "chain_errors",
    ),
    Row(
        "(S4)",
        "beta = 1 without loss of generality",
        "fails as printed",
        wrong_inverse_temperature,
        COUNTING,
        "rates",
    ),
)
