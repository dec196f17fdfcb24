"""The methods with a proof behind them: Exact, and Polynomial with its certificate."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

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
        narrow = jnp.finfo(problem.dtype).bits < 64
        gradient, loss, run, setup, told = _sweep(problem, self, axis, certified=not narrow)
        bounds, normaliser = told or _bounds_of_narrow(problem, self, axis, gradient)
        estimate = None
        if rows is not None and key is not None:
            estimate = error_estimate(
                problem, run.frame, setup.c, rows=rows, key=key, block=run.block
            )
        return GradientResult(
            gradient,
            loss,
            rank=run.features,
            bound=bounds,
            normaliser=normaliser,
            estimate=estimate,
        )


def _sweep(problem: LoRAProblem, method: Polynomial, axis: Axis, *, certified: bool):
    """(gradient, loss, plan, polynomial, (bounds, normaliser) or None): the three sweeps."""
    run = plan.make(problem, method, axis, certified=certified)
    summary = sweeps.summarise(run)
    setup = fitting.setup(run, summary.moments)
    grounds = None
    if run.columns is not None:
        limits = floors.make(problem, run.frame, run.columns, *summary.longest, run.devices)
        reach = jnp.maximum(*summary.longest)
        grounds = Grounds(problem, run.frame, run.columns, limits, setup, reach)
    c = monomials.coefficients(setup.c, run.width)
    seen = sweeps.visit_queries(run, grounds, summary.moments, summary.m * c)
    late = {} if seen.back is None else sweeps.visit_keys(run, seen.back * c)
    gradient = _in_inputs(run, seen, late)
    told = None
    if grounds is not None and seen.sums is not None:
        bounds = bound.finish(grounds, summary.moments, seen.sums, gradient, run.devices)
        told = bounds, seen.sums.certain
    return gradient, seen.loss, run, setup, told


def _bounds_of_narrow(problem: LoRAProblem, method: Polynomial, axis: Axis, gradient):
    """(bounds, normaliser) of a gradient in less than double precision.

    Worst-case rounding of long sums says nothing there. So the gradient of the same numbers is
    computed and certified in double precision, and the distance between the two, which is known,
    is added to its bounds.
    """
    dtype = problem.dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(_widened, problem)
        certified, _, _, _, told = _sweep(wide, method, axis, certified=True)
        assert told is not None
        bounds, normaliser = told

        def added(bound, x, y):
            distance = jnp.abs(x.astype(jnp.float64) - y).max()
            total = bound + jnp.where(jnp.isnan(distance), jnp.inf, distance)
            # outward, where it is rounded to the precision of the problem, or x or it to 0
            info = jnp.finfo(dtype)
            return (total * (1 + 2 * float(info.eps)) + float(info.tiny)).astype(dtype)

        bounds = jax.tree.map(added, bounds, gradient, certified)
        return bounds, normaliser.astype(dtype)


def _widened(x) -> jax.Array:
    """x in double precision, subnormal numbers too, which a conversion may take for 0."""
    wide = jnp.asarray(x, jnp.float64)
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits == 64:
        return wide
    info = jnp.finfo(dtype)
    bits = jax.lax.bitcast_convert_type(x, f"uint{info.bits}").astype(jnp.int64)
    mantissa = (bits & (2**info.nmant - 1)).astype(jnp.float64)
    sign = jnp.where(bits >> (info.bits - 1) == 1, -1.0, 1.0)
    subnormal = (bits >> info.nmant) & (2**info.nexp - 1) == 0
    return jnp.where(subnormal, sign * mantissa * float(info.smallest_subnormal), wide)


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
