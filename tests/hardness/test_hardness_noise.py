"""Theorem 4.1 with oracles that err: up to the tolerance no answer changes, above it answers
break.
"""

import numpy as np
import pytest

import lora_limits as ll
from lora_limits import hardness
from lora_limits.hardness import instances
from lora_limits.problem import Adapter
from tests.support.neighbours import DECIDERS, EXACT, MAKERS, neighbours, noisy


def _noise_instances(decider):
    rng = np.random.default_rng(7)
    for kind in MAKERS:
        for answer in (True, False):
            instance = neighbours(rng, 16, kind, answer)
            tolerance = hardness.nearest_neighbours(*instance, EXACT, decider=decider).tolerance
            yield instance, answer, tolerance
    if decider == "readout":
        for answer in (True, False):
            yield instances.random_orthogonality(rng, 20, 8, answer), answer, None


@pytest.mark.parametrize("decider", DECIDERS)
def test_errors_up_to_the_tolerance_change_no_answer(decider):
    rng = np.random.default_rng(8)
    for instance, answer, _ in _noise_instances(decider):
        decide = hardness.nearest_neighbours if len(instance) == 4 else hardness.orthogonal_vectors
        tolerance = decide(*instance, EXACT, decider=decider).tolerance
        against = -1.0 if answer else 1.0
        for error in (
            lambda shape, e=0.999 * tolerance * against: np.full(shape, e),
            lambda shape, e=tolerance: rng.uniform(-e, e, shape),
            lambda shape, e=tolerance: e * rng.choice([-0.999, 0.999], shape),
        ):
            decision = decide(*instance, noisy(error), decider=decider)
            assert bool(decision) is answer


@pytest.mark.parametrize("decider", DECIDERS)
def test_signed_errors_above_the_tolerance_flip_answers(decider):
    flips = {True: 0, False: 0}
    for instance, answer, tolerance in _noise_instances(decider):
        if tolerance is not None:
            error = 2.5 * tolerance * (-1.0 if answer else 1.0)
            decision = hardness.nearest_neighbours(
                *instance, noisy(lambda shape, e=error: np.full(shape, e)), decider=decider
            )
            flips[answer] += bool(decision) is not answer
    assert min(flips.values()) >= 1


def test_the_margin_is_the_error_that_flips_the_answer():
    instance = neighbours(np.random.default_rng(9), 32, "random", True)
    for decider in DECIDERS:
        margin = hardness.nearest_neighbours(*instance, EXACT, decider=decider).margin
        for factor, answer in ((0.99, True), (1.01, False)):
            oracle = noisy(lambda shape, e=factor * margin: np.full(shape, -e))
            assert bool(hardness.nearest_neighbours(*instance, oracle, decider=decider)) is answer


@pytest.mark.parametrize("decider", DECIDERS)
def test_an_oracle_that_answers_nan_decides_nothing(decider):
    def nothing(problem):
        return {name: Adapter(x.a * np.nan, x.b * np.nan) for name, x in problem.adapters.items()}

    assert not hardness.nearest_neighbours([[0, 1]], [[0, 1]], 0, 1, nothing, decider=decider)


def test_a_quadratic_does_not_crash_but_is_wrong():
    """The scores reach R = Theta(log n), far beyond what degree 2 can follow."""
    quadratic = hardness.gradient_oracle(ll.Polynomial(2))
    wrong = 0
    for answer in (True, False):
        a, b = instances.clustered_neighbours(np.random.default_rng(10), 32, 8, 1, 1, answer)
        wrong += bool(hardness.nearest_neighbours(a, b, 1, 1, quadratic)) is not answer
    assert wrong >= 1
