"""The degree that a tolerance needs, odd and even ones apart, and k* between degrees."""

import math

import pytest

from experiments.contenders.needed_degrees import crossing, features, needed

# odd ones are better than the even ones above them
ERRORS = [1.0, 1e-2, 1e-1, 1e-4, 1e-3, 1e-6, 1e-5]


def test_each_parity_crosses_on_its_own_line():
    assert crossing(ERRORS, 1, 1e-3) == (3, pytest.approx(2.0))
    assert crossing(ERRORS, 0, 1e-3) == (4, pytest.approx(4.0))
    assert crossing(ERRORS, 0, 1e-2) == (4, pytest.approx(3.0))
    assert crossing(ERRORS, 0, 1e-7) is None


def test_a_degree_counts_from_where_all_above_it_are_within():
    bumpy = [1.0, 1.0, 1e-4, 1.0, 1e-1, 1.0, 1e-5]
    assert crossing(bumpy, 0, 1e-3) == (6, pytest.approx(5.0))
    assert crossing([1.0, math.inf, 0.5, 1e-9], 1, 1e-3) == (3, 3.0)
    assert crossing([1.0, math.nan, 0.5, math.nan], 1, 1e-3) is None
    assert crossing([1e-9, 1.0, 1e-9], 0, 1e-3) == (0, 0.0)


def test_what_a_tolerance_needs():
    got = needed(ERRORS, 1e-3, width=8, length=1024)
    assert (got["degree"], got["features"]) == (3, math.comb(11, 3))
    assert (got["odd"], got["even"], got["real"]) == pytest.approx((2.0, 4.0, 2.0))
    assert got["exponent"] == pytest.approx(math.log(45) / math.log(1024), abs=1e-4)
    assert needed(ERRORS, 1e-9, width=8, length=1024)["exponent"] is None


def test_features_of_a_real_degree_go_through_those_of_the_integers():
    assert features(8, 3.0) == pytest.approx(math.comb(11, 3))
    assert math.comb(11, 3) < features(8, 3.5) < math.comb(12, 4)
