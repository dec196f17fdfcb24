"""What carries over to decoders: rotary positions, a causal order, grouped queries; beyond the paper."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lora_limits.gradients.methods import Exact, Polynomial
from lora_limits.gradients.solve import gradient
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.instruments.compiling import quick_jit
from lora_limits.instruments.counting import count_operations
from lora_limits.ledger.row import FULL, Evidence, Row, problem
from lora_limits.norms import norm_report
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem
from lora_limits.rotary import rotary_angles

LENGTH = 256
GAMMA = 0.7  # below sqrt(ln L) = 2.4
METHOD = Polynomial(6, block_size=64)
NEARS = "tests/gradients/test_polynomial_masked.py::test_every_combination_nears_the_exact_gradient"
TWICE = "tests/gradients/test_polynomial_masked.py::test_twice_the_tokens_cost_twice"


def decoder(length: int = LENGTH, **fields: Any) -> LoRAProblem:
    """The ledger's problem with two of its three coordinates turned, or with other fields."""
    fields = fields or {"rotations": rotary_angles(length, 2)}
    return dataclasses.replace(problem(FULL, length, gamma=GAMMA), **fields)


def _error(p: LoRAProblem) -> tuple[float, float]:
    """(error in max norm, the largest entry) of the polynomial gradient, all arrays."""
    run = quick_jit(lambda p, method: gradient(p, method).gradient, static_argnums=1)
    pairs = zip(*(jax.tree.leaves(run(p, m)) for m in (METHOD, Exact())), strict=True)
    both = [(float(np.abs(x - y).max()), float(np.abs(y).max())) for x, y in pairs]
    return max(e for e, _ in both), max(top for _, top in both)


def _exponent(**fields: Any) -> float:
    """Growth of the operations at a fixed degree, between 2048 and 4096 tokens."""

    def operations(length: int) -> float:
        given = {"rotations": rotary_angles(length, 2)} if "rotary" in fields else {}
        p = decoder(length, causal="causal" in fields, **given)
        return count_operations(lambda p: gradient(p, METHOD).gradient, p)["flops"]

    return math.log2(operations(4096) / operations(2048))


def _approximable(p: LoRAProblem, **fields: Any) -> Evidence:
    error, top = _error(p)
    slope = _exponent(**fields)
    text = f"error {error:.0e} of entries to {top:.0f}, 1/L = {1 / LENGTH:.0e}; "
    text += f"k = {monomials.count(3, METHOD.degree)}; time ~ L^{slope:.2f}"
    return Evidence(text, error <= 1 / LENGTH and slope < 1.05)


def rotary() -> Evidence:
    """Features of rotated rows: no sum over distances, hence no Fourier transform, is needed."""
    return _approximable(decoder(), rotary=True)


def causal() -> Evidence:
    """Prefix sums of the same features, block by block, a block's own scores exact."""
    return _approximable(decoder(causal=True), causal=True)


def turned_norms() -> Evidence:
    """R by lengths, which rotations keep, and the max norm before and after them."""
    fields: dict[str, Any] = {"query_mask": np.ones(LENGTH, bool)}
    turned = decoder(**fields, rotations=rotary_angles(LENGTH, 2))
    report = quick_jit(norm_report)
    after, before = report(turned), report(decoder(**fields))
    change = relative(float(after.score_bound_raw), float(before.score_bound_raw))
    ratio = float(after.gamma / before.gamma)
    text = f"bound of R changes by {change:.0e}; Gamma by a factor {ratio:.2f} <= sqrt 2"
    return Evidence(text, change < 1e-12 and 2**-0.5 <= ratio <= 2**0.5)


ROWS = (
    Row(
        "2412.17316",
        "gradients of rotary attention in L^{1+o(1)} while its entries are bounded (arXiv 2412.17316, "
        "by its abstract; that no bound is no algorithm, its other half, rests on SETH)",
        "holds",
        rotary,
        NEARS,
    ),
    Row(
        "Theorem A.1, causal",
        "a causal order leaves the gradient approximable in L^{1+o(1)}, by prefix sums",
        "holds",
        causal,
        TWICE,
    ),
    Row(
        "Rem. 5.2, rotary",
        "rotations keep R; Gamma, a max norm, within sqrt 2: conditions are on rotated rows",
        "holds",
        turned_norms,
        "tests/gradients/test_masked.py::test_the_norms_are_of_turned_rows_that_count",
    ),
)
