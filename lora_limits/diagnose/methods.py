"""Which methods are tried on a head, and in which order; and what norms one of them would need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_limits.diagnose.errors import Arrays, arrays, error, exact_arrays
from lora_limits.diagnose.outputs import cooled, laid_end_to_end
from lora_limits.diagnose.times import Clock
from lora_limits.factors import BlockTree, Skeleton, SparseLowRank
from lora_limits.gradients.by_rows import block_size, in_blocks
from lora_limits.gradients.methods import Polynomial
from lora_limits.method import Method
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem
from lora_limits.problem_checks import structure_of

MOST_FEATURES = 8192
MOST_LONGER = 4096  # tokens of the windows laid end to end
RANKS = (64, 128)
NEAR = ((256, 256), (512, 512), (1024, 1024))  # keys of BlockTree: near, sampled
ENTRIES = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 256))
HALVINGS = 5  # of the search for the norm that a head would need
LEAST_SCALE = 1 / 16


def ladder(problem: LoRAProblem, length: int) -> dict[str, tuple[Method, ...]]:
    """The methods that are tried, by family, smallest first. Extended here and nowhere else.

    Polynomials of at most MOST_FEATURES features; the others of at most half the tokens, those of
    all windows that are laid end to end. Families that do not know what the problem has (causal,
    rotations) are left out.
    """
    width = problem.weights.query.shape[1]
    degrees = [g for g in range(1, 25) if monomials.count(width, g) <= MOST_FEATURES]
    polynomials = (_approximating(problem, g) for g in degrees)
    families: dict[str, tuple[Method, ...]] = {
        "Polynomial": tuple(p for p in polynomials if p is not None),
        "Skeleton": tuple(Skeleton(k) for k in RANKS if 2 * k <= length),
        "SparseLowRank": tuple(SparseLowRank(t, k) for t, k in ENTRIES if 2 * (t + k) <= length),
        "BlockTree": tuple(BlockTree(n, m) for n, m in NEAR if 2 * (n + m) <= length),
    }
    has = set(structure_of(problem))
    return {name: tried for name, tried in families.items() if tried and has <= tried[0].knows}


def _approximating(problem: LoRAProblem, degree: int) -> Polynomial | None:
    """The polynomial where its blocks, exact in themselves with a causal order or documents, are at
    most a quarter of the tokens: in smaller ones where need be, None where there are none.

    Else short windows would seem right at any norm, for nothing in them is approximated.
    """
    quarter = -(-problem.x_key.shape[0] // 4)
    sizes = (None, quarter) if in_blocks(problem) else (None,)
    tried = (Polynomial(degree, block_size=size) for size in sizes)
    return next((p for p in tried if _exact_tokens(problem, p) <= quarter), None)


def _exact_tokens(problem: LoRAProblem, method: Polynomial) -> int:
    """To a block that is exact in itself; 0 where none is."""
    return block_size(problem, method) if in_blocks(problem) else 0


def label(method: Method) -> str:
    """A method as one would write it: Polynomial(3). Blocks go with the length, and are left out."""
    if isinstance(method, Polynomial):
        method = dataclasses.replace(method, block_size=None)
    fields = dataclasses.fields(method)  # pyright: ignore[reportArgumentType]
    given = {f.name: getattr(method, f.name) for f in fields}
    # A field without a default is always written, the others where they differ.
    told = [repr(given[f.name]) for f in fields if given[f.name] != f.default]
    return f"{type(method).__name__}({', '.join(told)})"


def climb(
    problems: Sequence[LoRAProblem], exact: Sequence[Arrays], tolerance: float, clock: Clock
) -> list[dict[str, Any]]:
    """Every method tried, family by family, smallest first, up to the first `within`: good enough.

    Good enough: within the tolerance in every window and, where it pays from longer texts only, on
    the windows laid end to end too, `error_longer` (None where it was not measured: one window, or
    tokens in an order). basis: what the length from which it pays rests on: "measured" at the
    windows' own length, "end to end" where the windows laid so reach it, else "extrapolated".
    """
    tried = []
    tokens = problems[0].x_query.shape[0]
    longer = None
    few = [] if structure_of(problems[0]) else problems[: _joined(tokens)]
    reach = tokens * max(1, len(few))
    for family, methods in ladder(problems[0], reach).items():
        for method in methods:
            found = [arrays(p, method) for p in problems]
            worst = max(error(got, want) for (got, _), want in zip(found, exact, strict=True))
            step = {
                "family": family,
                "method": method,
                "rank": found[0][1],
                "error": worst,
                "error_longer": None,
                "within": worst <= tolerance,
                "pays_from": None,
                "basis": None,
            }
            tried.append(step)
            # NaN is inf by now, so that nothing slips through.
            if worst > tolerance:
                continue
            # Times are what a diagnosis waits for: only of what is good enough.
            step["pays_from"] = clock.pays_from(problems[0], method)
            step["basis"] = _basis(step["pays_from"], tokens, reach)
            if step["pays_from"] > tokens and len(few) > 1:
                # The rank that is enough here need not be enough there.
                longer = longer or _with_exact(laid_end_to_end(few))
                step["error_longer"] = error(arrays(longer[0], method)[0], longer[1])
                step["within"] = step["error_longer"] <= tolerance
            if step["within"]:
                break
    return tried


def _basis(length: int, tokens: int, reach: int) -> str:
    """What is known at the length: tokens, of a window; reach, of windows laid end to end."""
    if length <= tokens:
        return "measured"
    return "end to end" if length <= reach else "extrapolated"


def _joined(tokens: int) -> int:
    """How many windows are laid end to end at most."""
    return max(1, MOST_LONGER // tokens)


def _with_exact(problem: LoRAProblem) -> tuple[LoRAProblem, Arrays]:
    return problem, exact_arrays(problem)


def affordable(problem: LoRAProblem, clock: Clock) -> tuple[Method, int]:
    """(the first method of the highest degree or rank that pays here, where it pays from).

    Of polynomials where they know the problem, since theirs is the norm bound of the theorems. One
    pays only where those below it do: one lucky time does not carry it over the exact gradient.
    """
    tokens = problem.x_query.shape[0]
    first, *higher = next(iter(ladder(problem, tokens).values()))
    best = first
    pays = clock.pays_from(problem, first)
    for method in higher if pays <= tokens else ():
        if clock.pays_from(problem, method) > tokens:
            break
        best = method
    return best, pays


def scale_needed(problem: LoRAProblem, method: Method, tolerance: float) -> float | None:
    """The largest factor on Q and K with which the method is within the tolerance.

    1 at most; None below 1/16. By halving log(factor) HALVINGS times.
    """

    def fits(factor: float) -> bool:
        cool = cooled(problem, jnp.asarray(factor, problem.dtype))
        return error(arrays(cool, method)[0], exact_arrays(cool)) <= tolerance

    if fits(1.0):
        return 1.0
    low = math.log(LEAST_SCALE)
    high = 0.0
    if not fits(math.exp(low)):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if fits(math.exp(middle)):
            low = middle
        else:
            high = middle
    return math.exp(low)
