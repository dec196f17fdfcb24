"""The dense scan over degrees, on which every measured k* rests, against the fast route and the
exact gradient.
"""

import dataclasses

import jax.numpy as jnp
import pytest

import lora_limits as ll
from experiments.contenders import degrees
from experiments.problems import conditioned as problems
from experiments.problems import smollm2
from lora_limits.polynomial import series
from tests.support.compiled import UNBOUNDED
from tests.support.tools import assert_close, quick_jit

SERIES = quick_jit(degrees.series_gradient)


@pytest.mark.parametrize("kind", ["gaussian", "large biases"])
@pytest.mark.parametrize("degree", [1, 4])
def test_the_dense_series_gradient_is_the_fast_one(kind, degree):
    p = problems.make(3, shape=problems.CROSS, kind=kind, reach=1.5)
    c = jnp.zeros(degrees.HIGHEST + 1).at[: degree + 1].set(series.taylor(degree, p.dtype))
    dense, normaliser = SERIES(p, c)
    fast = UNBOUNDED(p, ll.Polynomial(degree))
    assert_close(fast.gradient, dense, 1e-9)
    assert float(fast.normaliser) <= float(normaliser) * (1 + 1e-12)
    assert float(fast.normaliser) == pytest.approx(float(normaliser), rel=1e-6)


def test_of_a_causal_rotary_head_the_series_tends_to_the_exact_gradient():
    p = smollm2.problem(24, 5, length=24, dtype="float64")
    p = dataclasses.replace(p, beta=p.beta / 8)
    exact = quick_jit(ll.gradient, static_argnames="method")(p, method=ll.Exact()).gradient
    scan = degrees.errors_by_degree(p, range(1, 25), exact)
    assert scan[-1]["frobenius_error"] < 1e-6 < 1e-2 < scan[0]["frobenius_error"]
    assert scan[-1]["normaliser"] > 0


def test_errors_fall_with_the_degree_and_the_scan_stops_when_told():
    p = problems.make(3, shape=problems.CROSS, reach=1.5)
    exact = UNBOUNDED(p, ll.Exact()).gradient
    scan = degrees.errors_by_degree(p, range(1, 13), exact)
    assert [row["degree"] for row in scan] == list(range(1, 13))
    assert scan[-1]["max_error"] < 1e-6 * scan[0]["max_error"]
    short = degrees.errors_by_degree(p, range(1, 13), exact, enough=1e-3)
    assert len(short) < len(scan)
    assert max(row["max_error"] for row in short[-2:]) <= 1e-3 < short[-3]["max_error"]


def test_the_degree_is_the_one_from_which_the_error_stays_small():
    rows = [{"degree": g, "e": e} for g, e in ((1, 0.5), (2, 0.05), (3, 0.2), (4, 0.05), (5, 0.01))]
    assert degrees.first_below(rows, "e", 0.1) == 4
    assert degrees.first_below(rows, "e", 0.5) == 1
    assert degrees.first_below(rows, "e", 1e-3) is None
