"""The promise with a probability: its coin is exact, its bound misses no more often than it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.estimate import coin
from lora_limits.estimate.betting import mean_bound
from lora_limits.estimate.rows import Terms
from tests.support import reference
from tests.support.tools import quick_jit


def test_a_coin_has_the_chances_it_says_and_no_other():
    pi = np.random.default_rng(0).dirichlet(np.full(1000, 0.01))
    made = coin.make(jnp.asarray(pi))
    weights = np.asarray(made.weights)
    assert weights.sum() == coin.TOTAL
    assert (weights == np.floor(weights)).all()
    assert weights.min() >= 1
    np.testing.assert_allclose(made.chances, pi, atol=1e-8)


def test_a_draw_follows_the_coin():
    made = coin.make(jnp.asarray([0.5, 0.25, 0.25 - 1e-3, 1e-3]))
    drawn = np.asarray(coin.draw(jax.random.key(0), made, 100_000))
    share = np.bincount(drawn, minlength=4) / len(drawn)
    spread = np.sqrt(np.asarray(made.chances) / len(drawn))
    assert (np.abs(share - np.asarray(made.chances)) < 5 * spread).all()


@pytest.mark.parametrize(
    "kind", ["one in a thousand", "two values", "heavy tails", "nearly constant"]
)
def test_a_mean_is_missed_no_more_often_than_promised(kind):
    """10^4 times 64 draws of bounded numbers at delta = 0.05, where misses would be seen."""
    rng = np.random.default_rng(0)
    values = {
        "one in a thousand": np.where(np.arange(1000) == 7, 1.0, 0.0),
        "two values": np.where(np.arange(1000) < 600, 1.0, -1.0),
        "heavy tails": np.clip(rng.standard_t(1.5, 1000) / 30, -1, 1),
        "nearly constant": 0.3 + 1e-3 * rng.uniform(-1, 1, 1000),
    }[kind]
    delta, m = 0.05, 64
    x = jnp.asarray(values)[jax.random.randint(jax.random.key(1), (10_000, m), 0, 1000)]
    most = jnp.abs(jnp.asarray(values)).max()

    def bound(x):
        terms = Terms(x[None, :, None], jnp.ones_like(x)[None, :, None])
        return mean_bound(terms, jnp.ones_like(x), most, jnp.zeros_like(x), np.log(2 / delta))

    found = np.asarray(quick_jit(jax.vmap(bound))(x))[:, 0, 0]
    missed = (found < abs(values.mean())).mean()
    assert missed <= delta
    assert (found <= float(most)).all()


def test_confident_is_never_above_certified_and_holds_on_many_keys():
    problem = problems.make(5, shape=problems.Shape(lq=300, lk=40), reach=1.0)
    want = reference.loss_and_gradient(problem)[1]
    method = ll.Polynomial(2)
    keys = jax.random.split(jax.random.key(0), 50)

    def run(key):
        result = ll.gradient(problem, method, rows=128, key=key, delta=0.05)
        return result.gradient, result.bound, result.confident

    gradient, certified, confident = quick_jit(jax.vmap(run))(keys)
    for name, pair in want.items():
        for half, true in zip("ab", pair, strict=True):
            error = np.abs(np.asarray(getattr(gradient[name], half))[0] - true).max()
            sure = np.asarray(getattr(confident[name], half))
            assert (sure <= np.asarray(getattr(certified[name], half)) * (1 + 1e-12)).all()
            assert (sure >= error).mean() >= 0.9
            assert np.median(sure) < 0.9 * float(np.asarray(getattr(certified[name], half))[0])


@pytest.mark.parametrize("delta", [0.0, 1.0, 2, "0.1"])
def test_a_delta_that_is_no_probability_is_refused(delta):
    problem = problems.make(0)
    with pytest.raises(ValueError, match="delta: got"):
        ll.gradient(problem, ll.Polynomial(1), rows=4, key=jax.random.key(0), delta=delta)
