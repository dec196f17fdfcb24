"""The methods with a proof behind them: Exact, and Polynomial with its certificate."""

from __future__ import annotations

import dataclasses

import jax

from lora_limits.certificate import bound, floors
from lora_limits.certificate.terms import Grounds
from lora_limits.checks import check_integer, fail
from lora_limits.coordinates.collectives import Axis
from lora_limits.estimate.intervals import error_estimate
from lora_limits.gradients import exact, fitting, plan, sweeps
from lora_limits.gradients.plan import Plan
from lora_limits.linalg import dot
from lora_limits.method import GradientResult, Method, refuse_rows
from lora_limits.polynomial import monomials
from lora_limits.polynomial.series import SERIES
from lora_limits.problem import Adapter, LoRAProblem, scalars


@dataclasses.dataclass(frozen=True)
class Exact(Method):
    """The exact gradient.

    block_size None: dense, O(Lq Lk) memory; else tiled on both sides, O(L d + block_size^2).
    Raises ValueError for a block size that is not an integer of at least 1.
    """

    block_size: int | None = None

    def __post_init__(self):
        if self.block_size is not None:
            check_integer("Exact block_size", self.block_size, 1)

    def solve(
        self, problem: LoRAProblem, rows: int | None = None, key: jax.Array | None = None
    ) -> GradientResult:
        """As Method.solve; it has no error to estimate."""
        refuse_rows(self, rows)
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

    def __post_init__(self):
        check_integer("Polynomial degree", self.degree, 0)
        if self.block_size is not None:
            check_integer("Polynomial block_size", self.block_size, 1)
        if self.series not in SERIES:
            fail("Polynomial series", repr(self.series), f"one of {list(SERIES)}")

    def solve(
        self,
        problem: LoRAProblem,
        rows: int | None = None,
        key: jax.Array | None = None,
        axis: Axis = None,
    ) -> GradientResult:
        """Three sweeps over tokens (sweeps.py) and the certificate that rides on the second.

        Time O((Lq + Lk) k (1 + d_value + r) + L d_model (d + r)), memory
        O(k d (1 + d_value + r) + block (k + d d_value)). axis: mesh axes over which tokens are
        split; O(k (1 + d_value + r) + d_model r) numbers cross it, and the result is the same on
        every device.
        """
        run = plan.make(problem, self, axis)
        summary = sweeps.summarise(run)
        setup = fitting.setup(run, summary.moments)
        limits = floors.make(problem, run.frame, run.columns, *summary.longest)
        grounds = Grounds(problem, run.frame, run.columns, limits, setup)
        c = monomials.coefficients(setup.c, run.width)
        seen = sweeps.visit_queries(run, grounds, summary.moments, summary.m * c)
        late = {} if seen.back is None else sweeps.visit_keys(run, seen.back * c)
        estimate = None
        if rows is not None and key is not None:
            estimate = error_estimate(
                problem, run.frame, setup.c, rows=rows, key=key, block=run.block
            )
        return GradientResult(
            _in_inputs(run, seen, late),
            seen.loss,
            rank=run.features,
            bound=bound.finish(grounds, seen.sums, run.devices),
            normaliser=seen.sums.certain,
            estimate=estimate,
        )


def _in_inputs(run: Plan, seen: sweeps.Seen, late: dict) -> dict[str, Adapter]:
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
