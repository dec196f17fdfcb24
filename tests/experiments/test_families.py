"""The families of inputs of the certificates experiment: every one meets the reach it is asked
for.
"""

import numpy as np
import pytest

from experiments.problems import families
from lora_limits.coordinates import frame
from lora_limits.problem import as_jax, projections


@pytest.mark.parametrize("kind", families.KINDS)
@pytest.mark.parametrize("reach", [0.2, 8.0])
def test_the_largest_centred_score_is_the_reach(kind, reach):
    """In the library's own frame, whose centre of the keys moves with the queries."""
    problem = families.problem(
        np.random.default_rng(0), kind, length=40, width=3, rank=2, reach=reach
    )
    q, k, _ = projections(problem)
    centres = frame.of_problem(as_jax(problem))
    scores = problem.beta * (q - centres.nu[None]) @ (k - centres.mu[None]).T
    assert float(np.abs(scores).max()) == pytest.approx(reach, rel=1e-9)


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="kind: got 'noise', expected one of independent"):
        families.inputs(np.random.default_rng(0), "noise", 4, 2)
