"""Two problems on sets of binary vectors, answered by a gradient oracle, which alone sees them.

Both are gadgets (gadgets.py) handed to a decider (deciders.py). Nearest neighbours with a gap is
the problem the proof of Theorem 4.1 starts from; orthogonal vectors is the one SETH speaks about.
"""

from __future__ import annotations

from typing import Any, Literal

from lora_limits.checks import fail
from lora_limits.hardness.deciders import DECIDERS, Decision, decide_by_path
from lora_limits.hardness.gadgets import Gadget, hamming_gadget, orthogonal_gadget
from lora_limits.hardness.quadrature import Oracle

Decider = Literal["readout", "path"]


def _decide(gadget: Gadget, oracle: Oracle, decider: str, nodes: int | None) -> Decision:
    if decider not in DECIDERS:
        fail("decider", repr(decider), f"one of {list(DECIDERS)}")
    # The readout has no nodes, and the path chooses its own.
    if nodes is None:
        return DECIDERS[decider](gadget, oracle)
    if decider != "path":
        fail("nodes", f"{nodes} with decider={decider!r}", "decider='path'")
    if nodes < 1:
        fail("nodes", nodes, "at least 1")
    return decide_by_path(gadget, oracle, nodes=nodes)


def nearest_neighbours(
    a: Any,
    b: Any,
    distance: float,
    gap: float,
    oracle: Oracle,
    *,
    decider: Decider = "readout",
    nodes: int | None = None,
) -> Decision:
    """Is some Hamming distance between a_i and b_j at most `distance`?

    The promise: if not, all are >= distance + gap; where it is broken the answer may be either.
    a: (n_a, d), b: (n_b, d), entries 0 or 1. beta0 = (ln(n_a)/2 + ln(n_b) + c) / (2 gap) and
    R = beta0 d. Readout: ceil(2 beta0 distance + ln n_b) calls at most, each on L = O(n) tokens of
    width 2 d + 1. Path: `nodes` calls, by default O(log^2 n) that certify the integral.
    Raises ValueError for entries other than 0 and 1, widths that differ, empty sets, a distance
    outside 0..d, gap <= 0.
    """
    return _decide(hamming_gadget(a, b, distance, gap), oracle, decider, nodes)


def orthogonal_vectors(
    a: Any, b: Any, oracle: Oracle, *, decider: Decider = "readout", nodes: int | None = None
) -> Decision:
    """Is some <a_i, b_j> = 0? Right for any oracle within the tolerance.

    The gap of 1 is no promise but a fact. a: (n_a, d), b: (n_b, d), entries 0 or 1.
    beta0 = ln(n_a)/2 + ln(n_b) + c; Gamma = sqrt(d beta0) at beta = 1/d. Readout: ceil(ln n_b)
    calls at most, each on L = O(n) tokens of width d + 2.
    Raises ValueError for entries other than 0 and 1, widths that differ, and empty sets.
    """
    return _decide(orthogonal_gadget(a, b), oracle, decider, nodes)
