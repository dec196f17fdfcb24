"""The interval of one estimate, and the rows that it draws: textbook, probabilities, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import stdtrit

from experiments.problems import conditioned as problems
from lora_limits.coordinates import frame as frames
from lora_limits.estimate import intervals, rows
from tests.support.compiled import BLOCK
from tests.support.tools import quick_jit

TAYLOR = np.array([1, 1, 1 / 2, 1 / 6])
FRAME = quick_jit(frames.of_problem, static_argnums=(1, 2))
PROBABILITIES = quick_jit(lambda p, frame: intervals.probabilities(p, frame, 3, BLOCK))


def test_the_interval_is_that_of_the_textbook():
    """Mean, Student quantile and standard error from the samples written out, at another level."""
    rng = np.random.default_rng(0)
    left, right, weights = (
        rng.normal(size=(2, 9, 3)),
        rng.normal(size=(2, 9, 4)),
        rng.uniform(1, 5, 9),
    )
    x = np.einsum("tmi,tmj,m->mij", left, right, weights)
    deviation = x.std(0, ddof=1) / 9**0.5
    interval = quick_jit(intervals.interval, static_argnums=2)
    got = interval(rows.Terms(1e-180 * left, right), weights, 0.8)
    np.testing.assert_allclose(got.error, 1e-180 * x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.half_width, 1e-180 * stdtrit(8, 0.9) * deviation, rtol=1e-10)
    margin = stdtrit(8, 1 - 0.1 / 12) * deviation
    np.testing.assert_allclose(got.high, 1e-180 * (np.abs(x.mean(0)) + margin).max(), rtol=1e-10)
    np.testing.assert_allclose(
        got.low, 1e-180 * max(0, (np.abs(x.mean(0)) - margin).max()), rtol=1e-10
    )


@pytest.mark.parametrize(("length", "dtype"), [(13, np.float64), (1000, np.float32)])
def test_rows_are_drawn_as_often_as_they_should_be(length, dtype):
    pi = np.random.default_rng(0).uniform(0.1, 1, length) ** 3
    pi, n = (pi / pi.sum()).astype(dtype), 30_000
    index = np.asarray(quick_jit(intervals.draw, static_argnums=2)(jax.random.key(0), pi, n))
    assert index.dtype == np.int32
    count = np.bincount(index, minlength=length)
    assert (np.abs(count - n * pi) <= 5 * (n * pi) ** 0.5).all()


@pytest.mark.parametrize("kind", ["gaussian", "exact fit", "equal tokens", "zero target"])
def test_probabilities_are_at_least_half_uniform(kind):
    p = problems.make(3, shape=problems.CROSS, kind=kind)
    pi = np.asarray(PROBABILITIES(p, FRAME(p, BLOCK, True)))
    np.testing.assert_allclose(pi.sum(), 1, rtol=1e-13)
    assert (pi >= 0.5 / 11 * (1 - 1e-13)).all()


@pytest.mark.parametrize("rows", [1, 0, -3, 2.0, True, "4", None])
def test_rows_that_are_no_count_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows: got {rows!r}, expected an integer of at least 2"):
        intervals.error_estimate(
            problems.make(0), None, jnp.asarray(TAYLOR), rows=rows, key=jax.random.key(0)
        )


@pytest.mark.parametrize("level", [0, 1.0, 95])
def test_levels_that_are_no_probability_are_refused(level):
    with pytest.raises(
        ValueError, match=f"level: got {level!r}, expected a number between 0 and 1"
    ):
        intervals.error_estimate(
            problems.make(0), None, jnp.asarray(TAYLOR), rows=8, key=jax.random.key(0), level=level
        )
