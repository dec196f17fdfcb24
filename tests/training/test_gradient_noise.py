"""Gradients example by example: their mean, their moments, and the batch at which error and noise
are equal.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from lora_limits.training import gradient_noise, loop
from lora_limits.training.batches import Data
from paper_figures.numbers import batch_and_rank
from tests.support.plain_transformer import average, make, tokens


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def data():
    return Data(np.asarray(tokens(6)), np.arange(6, dtype=np.int32) % 3)


def test_the_mean_over_examples_is_the_gradient_of_their_batch(model, data):
    model = loop.with_methods(model, [loop.EXACT])
    rows = gradient_noise.per_example(model, data)
    leaves = jax.tree.leaves(loop.gradients(*nnx.split(model, loop.ADAPTERS, ...), *data))
    np.testing.assert_allclose(
        rows.mean(0), np.concatenate([np.ravel(x) for x in leaves]), atol=1e-12
    )
    assert rows.std(0).max() > 1e-3


def test_chunks_of_examples_are_put_together_and_what_is_left_is_dropped(model, data):
    whole = gradient_noise.per_example(model, data)
    np.testing.assert_allclose(
        gradient_noise.per_example(model, Data(*(x[:5] for x in data)), 2), whole[:4], atol=1e-12
    )


def test_an_error_is_that_of_the_whole_batch_and_none_for_the_exact_method(model, data):
    found = gradient_noise.compare(model, data, {"exact again": loop.EXACT, "average": average})
    assert found["exact again"]["relative"] < 1e-12
    averaged = loop.with_methods(model, [average])
    assert found["average"]["relative"] == pytest.approx(loop.compare(averaged, data)["error"])


def test_moments_are_unbiased_and_say_how_large_the_mean_of_a_batch_is():
    """Over 4000 batches of 16: E || mean ||^2 = mean + spread / 16."""
    draws = np.random.default_rng(0).normal(size=(4000, 16, 3)) * [1.0, 2.0, 0.1] + [0.5, 0.0, 0.2]
    found = [gradient_noise.moments(batch) for batch in draws]
    mean, spread = (np.mean([each[name] for each in found]) for name in ("mean", "spread"))
    assert mean == pytest.approx(0.29, abs=0.03)
    assert spread == pytest.approx(5.01, rel=0.02)
    assert (draws.mean(1) ** 2).sum(1).mean() == pytest.approx(mean + spread / 16, rel=1e-9)


def test_error_and_noise_are_equal_at_the_crossing():
    exact, error = {"mean": 1.0, "spread": 30.0}, {"mean": 0.04, "spread": 2.0}
    assert batch_and_rank.crossing(exact, error) == pytest.approx(700)
    assert batch_and_rank.ratio(exact, error, 700) == pytest.approx(1)
    assert batch_and_rank.crossing(exact, error | {"spread": 40.0}) == 0
    assert batch_and_rank.crossing(exact, error | {"mean": -0.01}) == np.inf
