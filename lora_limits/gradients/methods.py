"""The methods with a proof behind them: Exact, and Polynomial with its certificate."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.certificate import bound, floors
from lora_limits.certificate.row_bounds import Setup
from lora_limits.certificate.terms import Grounds
from lora_limits.checks import fail, set_integers
from lora_limits.coordinates.collectives import Axis
from lora_limits.estimate.intervals import error_estimate
from lora_limits.estimate.rows import polynomial_kernel, row_errors
from lora_limits.gradients import (
    by_rows,
    by_rows_bound,
    by_rows_error,
    confidence,
    exact,
    fitting,
    key_summary,
    plan,
    sweeps,
)
from lora_limits.gradients.plan import Plan
from lora_limits.linalg import dot, widened
from lora_limits.method import GradientResult, Method, Sampling, refuse_sampling
from lora_limits.polynomial import monomials
from lora_limits.polynomial.series import SERIES
from lora_limits.problem import Adapter, LoRAProblem, scalars
from lora_limits.problem_checks import STRUCTURE, refuse_structure, structure_of


@dataclasses.dataclass(frozen=True)
class Exact(Method):
    """The exact gradient.

    block_size None: dense, O(Lq Lk) memory; else tiled on both sides, O(L d + block_size^2).
    Raises ValueError for a block size that is not an integer of at least 1.
    """

    block_size: int | None = None
    knows = frozenset(STRUCTURE)

    def __post_init__(self):
        if self.block_size is not None:
            set_integers(self, block_size=1)

    def solve(self, problem: LoRAProblem, sampling: Sampling | None = None) -> GradientResult:
        """As Method.solve; it has no error to estimate."""
        refuse_sampling(self, sampling)
        if self.block_size is None:
            loss, gradient = exact.dense_gradient(problem)
        else:
            loss, gradient = exact.tiled_gradient(problem, self.block_size)
        return GradientResult(gradient, loss, rank=None)


@dataclasses.dataclass(frozen=True)
class Polynomial(Method):
    """exp replaced by a polynomial of the given degree in the scores.

    k = binom(d + degree, degree) features. series: "taylor" (tightest certificate), "chebyshev"
    (minimax on the score range), "fitted" (least squares on a sample of scores). centred: shift
    queries and keys first, which changes nothing in exact arithmetic and shrinks the scores.
    block_size: tokens whose features are held at once; None: as many as keep a block in a CPU's
    cache or, on an accelerator, in 128 MiB (float32).
    Raises ValueError for a negative degree or an unknown series.
    """

    degree: int
    series: str = "taylor"
    centred: bool = True
    block_size: int | None = None
    knows = frozenset(STRUCTURE) - {"window"}

    def __post_init__(self):
        set_integers(self, degree=0)
        if self.block_size is not None:
            set_integers(self, block_size=1)
        if self.series not in SERIES:
            fail("Polynomial series", repr(self.series), f"one of {list(SERIES)}")

    def solve(
        self, problem: LoRAProblem, sampling: Sampling | None = None, axis: Axis = None
    ) -> GradientResult:
        """Three sweeps over tokens (sweeps.py) and the certificate that rides on the second.

        Time O((Lq + Lk) k (1 + d_value + r) + L d_model (d + r)), memory
        O(k d (1 + d_value + r) + block (k + d d_value)). axis: mesh axes over which tokens are
        split; O(k (1 + d_value + r) + d_model r) numbers cross it, and the result is the same on
        every device.
        """
        if structure_of(problem):
            return _by_rows(problem, self, axis, sampling)
        narrow = jnp.finfo(problem.dtype).bits < 64
        run, setup, swept = _sweep(problem, self, axis, sampling, certified=not narrow)
        gradient, loss, told = swept
        if told is None:
            told = _told_of_narrow(problem, self, axis, sampling, gradient)
        estimate = None
        if sampling is not None:
            estimate = error_estimate(
                problem, run.frame, setup.c, rows=sampling.rows, key=sampling.key, block=run.block
            )
        return GradientResult(
            gradient,
            loss,
            rank=run.features,
            bound=told.bound,
            confident=told.confident,
            normaliser=told.normaliser,
            estimate=estimate,
        )


def _by_rows(
    problem: LoRAProblem, method: Polynomial, axis: Axis, sampling: Sampling | None
) -> GradientResult:
    """Of a problem with a causal order, rotations or masks (by_rows.py, by_rows_bound.py)."""
    if axis is not None:
        refuse_structure(problem, "a gradient over several devices")
    by_rows.check(problem, method)
    found = by_rows.solve(problem, method)
    if jnp.finfo(problem.dtype).bits == 64:
        told = by_rows_bound.told(problem, method, found, sampling)
    else:
        told = by_rows_bound.told_of_narrow(problem, method, found, sampling)
    estimate = None
    if sampling is not None:
        estimate = by_rows_error.error_estimate(problem, method, found.rows, sampling)
    return GradientResult(
        found.gradient,
        found.loss,
        rank=by_rows.features(problem, method),
        bound=told.bound,
        confident=told.confident,
        normaliser=found.normaliser,
        estimate=estimate,
    )


class _Told(NamedTuple):
    """What is said of a gradient, as in GradientResult."""

    bound: dict[str, Adapter]
    confident: dict[str, Adapter] | None
    normaliser: jax.Array


class _Swept(NamedTuple):
    """What three sweeps give."""

    gradient: dict[str, Adapter]
    loss: jax.Array
    told: _Told | None


def _sweep(
    problem: LoRAProblem,
    method: Polynomial,
    axis: Axis,
    sampling: Sampling | None,
    *,
    certified: bool,
) -> tuple[Plan, Setup, _Swept]:
    """The plan, the polynomial, and what the sweeps give."""
    run = plan.make(problem, method, axis, certified=certified)
    run = run._replace(sampled=certified and sampling is not None)
    summary = key_summary.summarise(run)
    setup = fitting.setup(run, summary.moments)
    grounds = grounds_of(run, summary, setup)
    c = monomials.coefficients(setup.c, run.width)
    seen = sweeps.visit_queries(run, grounds, summary.m * c)
    late = {} if seen.back is None else sweeps.visit_keys(run, seen.back * c)
    gradient = in_inputs(run, seen, late)
    if grounds is None or seen.sums is None:
        return run, setup, _Swept(gradient, seen.loss, None)
    parts = bound.finish(grounds, seen.sums, gradient, run.parts)
    certain = bound.bounds_of(parts)
    sure = None
    if seen.each is not None and sampling is not None:
        truncation, rounding = bound.outward(problem, *seen.each)
        kernel = polynomial_kernel(setup.c)
        sure = confidence.confident(
            problem,
            parts,
            truncation,
            confidence.COMPUTED * rounding,
            gradient,
            sampling,
            lambda index: row_errors(problem, run.frame, kernel, index, run.block),
        )
    told = _Told(certain, sure, seen.sums.certain)
    return run, setup, _Swept(gradient, seen.loss, told)


def grounds_of(run: Plan, summary: key_summary.Summary, setup: Setup) -> Grounds | None:
    """What the bound stands on; None where nothing is certified."""
    if run.columns is None:
        return None
    limits = floors.make(run.problem, run.frame, run.columns, *summary.longest, run.parts)
    reach = jnp.maximum(*summary.longest)
    return Grounds(run.problem, run.frame, run.columns, limits, setup, summary.moments, reach)


def _told_of_narrow(
    problem: LoRAProblem, method: Polynomial, axis: Axis, sampling: Sampling | None, gradient
) -> _Told:
    """What is said of a gradient in less than double precision.

    Worst-case rounding of long sums says nothing there. So the gradient of the same numbers is
    computed and certified in double precision, and the distance between the two, which is known,
    is added to its bounds.
    """
    dtype = problem.dtype
    with jax.enable_x64(True):
        _, _, swept = _sweep(widened_problem(problem), method, axis, sampling, certified=True)
        told = swept.told
        assert told is not None

        def of_narrow(bounds):
            return bound.with_distance(bounds, gradient, swept.gradient)

        sure = None if told.confident is None else of_narrow(told.confident)
        return _Told(of_narrow(told.bound), sure, told.normaliser.astype(dtype))


def widened_problem(problem: LoRAProblem) -> LoRAProblem:
    """The same numbers in double precision; tokens stay as they are, and are widened when read."""

    def wide(path, leaf):
        is_tokens = path[0].name in ("x_query", "x_key", "x_value", "target")
        return leaf if is_tokens else widened(leaf, jnp.float64)

    return jax.tree_util.tree_map_with_path(wide, problem)


def in_inputs(run: Plan, seen: sweeps.Seen, late: dict) -> dict[str, Adapter]:
    """The gradients of the sweeps, from the frame's coordinates to those of the adapters."""
    frame = run.frame
    out = {}
    for name in run.problem.adapters:
        if name == "query":
            half_a, half_b = dot(seen.gradient["query"].a, frame.to_x), seen.gradient["query"].b
        elif name == "key":
            half_a, half_b = dot(late["key"].a, run.from_y()), late["key"].b
        else:
            # centred X_V has lost the mean, which met the sum of c~ A^T
            assert seen.ca is not None
            half_a = seen.gradient["value"]
            half_b = late["value"] + frame.xv_mean[:, None] * seen.ca[None]
        out[name] = Adapter(half_a, half_b)
    scale = scalars(run.problem)[0]
    return jax.tree.map(lambda x: scale * x, out)
