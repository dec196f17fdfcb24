"""The law of the degree: Taylor's remainder at real degrees, solved either way."""

import math

import pytest

from lora_limits.polynomial import law, needed


@pytest.mark.parametrize("degree", [0, 3, 20, 200])
@pytest.mark.parametrize("radius", [0.01, 1.0, 30.0])
def test_at_integers_it_is_the_remainder(degree, radius):
    terms = (n * math.log(radius) - math.lgamma(n + 1) for n in range(degree + 1, degree + 400))
    largest, *rest = sorted(terms, reverse=True)
    want = largest + math.log(1 + sum(math.exp(x - largest) for x in rest))
    assert law.log_remainder(degree, radius) == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 2.0**-20, 2.0**-64])
@pytest.mark.parametrize("radius", [0.5, 4.0, 44.0])
def test_degree_and_radius_are_inverse(tolerance, radius):
    degree = law.degree_of(radius, tolerance)
    assert law.radius_of(degree, tolerance) == pytest.approx(radius, rel=1e-6)
    whole = needed.degree_needed(radius, tolerance, "taylor")
    assert whole - 1 <= degree <= whole


def test_degree_nought_may_be_enough_and_nonsense_is_refused():
    assert law.degree_of(1e-4, 1e-2) == 0
    assert law.log_remainder(2, 0.0) == -math.inf
    for call in (
        lambda: law.degree_of(-1.0, 0.1),
        lambda: law.degree_of(1.0, 1.0),
        lambda: law.radius_of(-1.0, 0.1),
        lambda: law.radius_of(1.0, math.nan),
    ):
        with pytest.raises(ValueError, match=r"got .*, expected a number"):
            call()
