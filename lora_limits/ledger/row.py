"""What a row of the ledger is, and the small problems its checks run on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from lora_limits.gradients import exact
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem

VERDICTS = (
    "definition",
    "holds",
    "holds as corrected",
    "fails as printed",
    "conditional on SETH",
    "assumption",
)
PARTIAL = ("query", "value")
FULL = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a check measured, for people; and whether that supports the verdict."""

    measured: str
    holds: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One statement of the paper (ICLR 2025), and how it is checked."""

    number: str  # as in the paper
    statement: str
    verdict: str
    check: Callable[[], Evidence]  # measures it, in float64, in about a second at most
    test: str  # the pytest node that tries it harder
    figure: str = ""  # the module of paper_figures that shows it


def close(error: float, limit: float = 1e-12, what: str = "relative error") -> Evidence:
    """An error that has to stay within rounding."""
    return Evidence(f"{what} {error:.1e}", error <= limit)


@functools.cache
def problem(
    adapt: tuple[str, ...] = FULL,
    length: int = 24,
    keys: int = 0,
    gamma: float = 1.0,
    square: bool = False,
) -> LoRAProblem:
    """A gaussian problem in NumPy float64: d_model = 5, d = 3, d_value = 4, r = 2.

    square: all three widths are 4. keys: Lk, with inputs of their own (cross-attention); 0:
    self-attention. beta = 1/d and both Q and K have max norm gamma, so |S| <= gamma^2. The same
    arguments give the same problem.
    """
    # NumPy, so that a check can be read beside the paper and run without a compiler.
    rng = np.random.default_rng(7)
    dm, d, dv = (4, 4, 4) if square else (5, 3, 4)
    xq = rng.normal(size=(length, dm))
    xk, xv = (rng.normal(size=(keys, dm)), rng.normal(size=(keys, dm))) if keys else (xq, xq)
    w = {name: rng.normal(size=(dm, dv if name == "value" else d)) for name in FULL}
    ab = {}
    for name in FULL:
        a = rng.normal(size=(2, w[name].shape[1])) / 2
        ab[name] = Adapter(a, rng.normal(size=(dm, 2)) / 2)
    scale = 0.7
    # W* and A scaled alike, for W* + s B A to have the norm asked for.
    for name, x in (("query", xq), ("key", xk)):
        full = w[name] + (scale * ab[name].b @ ab[name].a if name in adapt else 0)
        size = gamma / np.abs(x @ full).max()
        w[name] = size * w[name]
        ab[name] = Adapter(size * ab[name].a, ab[name].b)
    adapters = {name: ab[name] for name in adapt}
    weights = AttentionWeights(**w)
    y = rng.normal(size=(length, dv))
    return LoRAProblem(xq, xk, xv, y, weights=weights, adapters=adapters, scale=scale, beta=1 / d)


@functools.cache
def bounded(
    adapt: tuple[str, ...], length: int = 4096, width: int = 8, gamma: float = 1.5
) -> LoRAProblem:
    """A self-attention problem inside the hypotheses of Theorems 3.1 and A.1 at Gamma = gamma.

    Uniform tokens of max norm gamma, projections near rotations: X, Q, K and Q W_K^T have max norm
    gamma at most. d_model = d = d_value = width, r = 2, beta = 1/d.
    """
    rng = np.random.default_rng(11)
    x = gamma * rng.uniform(-1, 1, size=(length, width))
    w, ab = {}, {}
    for name in FULL:
        w[name] = np.linalg.qr(rng.normal(size=(width, width)))[0]
        a, b = rng.normal(size=(2, width)) / 4, rng.normal(size=(width, 2)) / 4
        whole = w[name] + (b @ a if name in adapt else 0)
        size = gamma / np.abs(x @ whole).max() if name != "value" else 1.0
        w[name], ab[name] = size * w[name], Adapter(size * a, b)
    y = rng.normal(size=(length, width))
    adapters = {name: ab[name] for name in adapt}
    weights = AttentionWeights(**w)
    return LoRAProblem(x, x, x, y, weights=weights, adapters=adapters, scale=1.0, beta=1 / width)


@functools.cache
def sampled(keys: int = 0, length: int = 4096, rows: int = 48) -> LoRAProblem:
    """A gaussian problem of all adapters with `length` keys, of whose queries some rows are drawn.

    Every term of the chain is made row by row, so that what holds of these rows is what an L x L
    reference would show. keys: other inputs for the keys, so many; 0: self-attention.
    """
    p = problem(FULL, length, keys)
    some = np.linspace(0, length - 1, rows).astype(int)
    return dataclasses.replace(p, x_query=p.x_query[some], target=p.target[some])


def terms(p: LoRAProblem) -> dict[str, np.ndarray]:
    """Q, K, V, f, c, q, rho, p1, p2, p of a problem as NumPy arrays."""
    return {name: np.asarray(x) for name, x in exact.dense_terms(p).items()}


def exact_gradient(p: LoRAProblem) -> dict[str, Adapter]:
    """The dense gradient, as NumPy arrays."""
    return jax.tree.map(np.asarray, exact.dense_gradient(p)[1])
