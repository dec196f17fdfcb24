"""From a tolerance to the cheapest method that keeps it, by a cost model and the promises made."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_limits.certificate.bound import arrays_of
from lora_limits.checks import check_number, fail
from lora_limits.gradients.cost import affordable, exact_method
from lora_limits.gradients.exact_rounding import rounding
from lora_limits.gradients.guessing import guess
from lora_limits.gradients.methods import Polynomial
from lora_limits.gradients.solve import gradient
from lora_limits.method import GradientResult, Method
from lora_limits.problem import Adapter, LoRAProblem, as_jax
from lora_limits.problem_checks import check_static, check_values, structure_of

ROWS = 1024  # queries drawn where the promise with a probability is enough
UPWARDS = 3  # degrees that are run from the guess up
TRIES = UPWARDS + 1  # and one below it; each has its part of delta

_gradient = jax.jit(gradient, static_argnames=("method", "rows", "delta"))


def _within(result: GradientResult, tolerance: float, relative: bool, sampled: bool) -> bool:
    """Whether every array is promised to be within the tolerance."""
    promised = result.confident if sampled else result.bound
    assert promised is not None
    for name, bounds in promised.items():
        for half in ("a", "b"):
            bound = float(getattr(bounds, half))
            allowed = tolerance
            if relative:
                # the true array's largest entry, from below: measured, less what it may be off by
                got = getattr(result.gradient[name], half)
                allowed = tolerance * (float(jnp.abs(got).max()) - bound)
            if not bound <= allowed:
                return False
    return True


def _ladder(first: int, most: int) -> list[int]:
    """Degrees to try: the guess, then even ones above it.

    At odd degrees the leading error cancels, which no bound of absolute values sees: the even degree
    below promises about as much, for less.
    """
    start = min(first + first % 2, most - most % 2)
    return list(range(start, most + 1, 2))[:UPWARDS]


def _degrees(problem: LoRAProblem, aim: float, most: int, relative: bool) -> list[int]:
    """Degrees to try: from the guess up, or from 2 where sampled rows are no guess."""
    if structure_of(problem):
        return _ladder(2, most) if most >= 2 else []
    first = guess(problem, aim, most, _largest(problem) if relative else None)
    return _ladder(first, most) if first <= most + 1 else []


def choose(
    problem: LoRAProblem,
    tolerance: float,
    *,
    relative: bool = False,
    key: jax.Array | None = None,
    delta: float = 1e-6,
) -> Method:
    """The cheapest method that promises every array within `tolerance` in max norm; else Exact.

    relative: the tolerance is times each array's largest entry. key: with one, the promise that
    holds with probability 1 - delta over draws by that key is enough (`GradientResult.confident`),
    which is much smaller; without, it is the certified one.
    The cost model gives the largest degree that beats the exact gradient; sampled rows give a first
    guess of the degree needed; the promise of a real run decides, in even degrees upwards, and
    downwards once. Taylor only: its bounds are the tightest. For a problem with masks, rotations
    or an order there is no guess, and degrees 2, 4 and 6 are tried; what is certified there is loose
    (gradients/by_rows_range.py), so a key is of more use. Concrete problems only (not under jit).
    Costs a few polynomial gradients.
    Raises ValueError for a tolerance that is not a positive number, where the rounding of the exact
    gradient itself may exceed it, and as `gradient`.
    """
    wanted = "a number above 0"
    if not check_number("tolerance", tolerance, wanted) > 0:
        fail("tolerance", repr(tolerance), wanted)
    check_static(problem)
    check_values(problem)
    problem = as_jax(problem)
    tolerance = float(tolerance)
    # a window no polynomial knows
    most = -1 if problem.window is not None else affordable(problem)

    def keeps(degree: int) -> bool:
        options = {} if key is None else {"rows": ROWS, "key": key, "delta": delta / TRIES}
        result = _gradient(problem, method=Polynomial(degree), **options)
        return _within(result, tolerance, relative, sampled=key is not None)

    # the guess is of certified bounds; ten times less is promised with a probability
    aim = 10 * tolerance if key is not None else tolerance
    tried = [] if most < 0 else _degrees(problem, aim, most, relative)
    for degree in tried:
        if keeps(degree):
            lower = degree - 2
            if degree == tried[0] and lower >= 0 and keeps(lower):
                return Polynomial(lower)
            return Polynomial(degree)
    exact = exact_method(problem)
    lost, sizes = rounding(problem, exact)
    for name, half in arrays_of(problem):
        allowed = tolerance * (float(getattr(sizes[name], half)) if relative else 1.0)
        least = float(getattr(lost[name], half))
        if not least <= allowed:
            got = f"{allowed:.1e} for {name}.{half}"
            if most >= 0:
                got += f", more than any polynomial up to degree {most}"
            expected = f"at least {least:.1e}, by which Exact may be rounded in {problem.dtype}"
            wide = problem.dtype == jnp.float64
            fail("tolerance", got, expected + ("" if wide else " (float64 rounds less)"))
    return exact


def _largest(problem: LoRAProblem) -> dict[str, Adapter]:
    """About the largest entry of every array: what a relative tolerance is relative to."""
    gradient_of = _gradient(problem, method=Polynomial(2)).gradient
    return jax.tree.map(lambda x: float(jnp.abs(x).max()), gradient_of)
