"""What the factors of f have in common: one gradient, and an estimate of its error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import Frame
from lora_limits.estimate import relative
from lora_limits.estimate.intervals import half_uniform
from lora_limits.factors import masked, masked_error
from lora_limits.factors.factor import Factor, apply, normalise, rows_of
from lora_limits.factors.kernel import factored_gradient
from lora_limits.linalg import dot, row_norms
from lora_limits.method import GradientResult, Method, Sampling
from lora_limits.problem import LoRAProblem, project, projections
from lora_limits.problem_checks import structure_of

ROWS = 64  # queries on which an error is estimated where nobody says how many
LOST = 0.5  # an error estimated at this may as well be 1: the gradient is reported as failed


class FactorMethod(Method):
    """A method that is a way to factor f: a frozen dataclass with a `factor` of its own.

    What is here turns any factor into a gradient that says how wrong it may be.
    """

    knows = frozenset({"causal", "rotations", "query_mask", "key_mask"})

    def factor(
        self, x: Float[Array, "lq d_and_1"], y: Float[Array, "lk d_and_1"]
    ) -> tuple[Factor, Float[Array, " lq"] | None]:
        """(f~, where to look for errors) with f = softmax(x y^T).

        x, y: as `Frame.product` makes them, x with a last column of ones, y with log-weights; a row
        of zeros in x is a query that is not there, and may get any row of finite numbers. Rows of
        f~ need not sum to 1 yet. The second is how large the error of each query may be, as far
        as the method knows, or None.
        """
        raise NotImplementedError

    def solve(self, problem: LoRAProblem, sampling: Sampling | None = None) -> GradientResult:
        """The gradient by the factor, its error estimated from sampled rows (64 unless given).

        failed: where an estimate is half or more, something is not finite or a row sum not positive.
        """
        sampling = sampling or Sampling(ROWS, jax.random.key(0))
        if structure_of(problem):
            return _masked(problem, self, sampling)
        frame = frames.of_problem(problem)
        factor, indicator, smallest = factorise(coordinates(problem, frame), self)
        loss, gradient = factored_gradient(problem, factor)
        estimates, wrong = relative.from_rows(
            problem,
            frame,
            lambda index: _explicit(rows_of(factor, index)),
            _probabilities(problem, factor, indicator),
            gradient,
            rows=sampling.rows,
            key=sampling.key,
        )
        return _told(gradient, loss, factor, smallest, estimates, wrong)


def _masked(problem: LoRAProblem, method: FactorMethod, sampling: Sampling) -> GradientResult:
    """The gradient of a problem with a causal order, rotations or padding."""
    made = masked.make(problem, method.factor)
    found = masked.gradient(problem, made)
    estimates, wrong = masked_error.estimate(problem, made, found, sampling)
    return _told(found.gradient, found.loss, made.factor, made.smallest, estimates, wrong)


def _told(gradient, loss, factor: Factor, smallest, estimates, wrong) -> GradientResult:
    """The result, with the verdict on it."""
    errors = jnp.stack(jax.tree.leaves(wrong))
    return GradientResult(
        gradient,
        loss,
        rank=factor.width,
        normaliser=smallest,
        estimate=estimates,
        relative_error=wrong,
        failed=~((errors < LOST).all() & (smallest > 0)),
    )


def coordinates(
    problem: LoRAProblem, frame: Frame
) -> tuple[Float[Array, "lq d_and_1"], Float[Array, "lk d_and_1"]]:
    """(x, y) of a problem, as factors are built from. O(L d_model d) time."""
    q = project(problem, "query", problem.x_query) - frame.nu[None]
    k = project(problem, "key", problem.x_key) - frame.mu[None]
    return frame.product(q, k)


def factorise(
    xy: tuple[jax.Array, jax.Array], method: FactorMethod
) -> tuple[Factor, Float[Array, " lq"] | None, Float[Array, ""]]:
    """(f~ with rows that sum to 1, where to look for errors, the smallest row sum it had)."""
    factor, indicator = method.factor(*xy)
    # Rows of queries that are not there are nobody's concern.
    factor, total = normalise(factor, xy[0][:, -1] > 0)
    return factor, indicator, total.min()


def _explicit(rows: Float[Array, "m lk"]):
    """The kernel of rows that are written out: the same in the factor and in its kernel."""
    lk = rows.shape[1]

    def kernel(s, w, first):
        del w
        part = jax.lax.dynamic_slice_in_dim(rows, first, min(s.shape[1], lk), 1)
        return part, part

    return kernel


def _probabilities(
    problem: LoRAProblem, factor: Factor, indicator: Float[Array, " lq"] | None
) -> Float[Array, " lq"]:
    """pi: half uniform, half in proportion to |c~_i| times the indicator, |f~_i| if there is none."""
    residual = apply(factor, projections(problem)[2]) - problem.target
    if indicator is None:
        # a row of large entries of both signs can do no harm to the output and all to the gradient
        gram = dot(factor.right.T, factor.right)
        square = (dot(factor.left, gram) * factor.left).sum(1)
        indicator = jnp.sqrt(jnp.maximum(square, 0))
    size = row_norms(residual) * indicator
    return half_uniform(jnp.where(jnp.isfinite(size), size, 0))
