"""The relative error of a factor's gradient: what samples miss is seen where it is likeliest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import minilm
from lora_limits.estimate import relative
from lora_limits.estimate.rows import Terms
from tests.support.compiled import GRADIENT
from tests.support.tools import arrays, quick_jit


def rows(count, seed):
    """The shares of `count` rows in an error: two outer products each, (2, count, 3) and (2, count,
    4).
    """
    rng = np.random.default_rng(seed)
    return Terms(*(jnp.asarray(rng.normal(size=(2, count, n))) for n in (3, 4)))


def total(terms):
    return np.einsum("tmi,tmj->ij", *terms)


def test_certain_rows_alone_give_the_error_itself():
    certain, nothing = rows(2, 0), Terms(jnp.zeros((2, 8, 3)), jnp.zeros((2, 8, 4)))
    approximate = np.random.default_rng(1).normal(size=(3, 4))
    error = total(certain)
    got = relative.relative_error(nothing, jnp.ones(8), certain, jnp.asarray(approximate))
    assert float(got) == pytest.approx(np.linalg.norm(error) / np.linalg.norm(approximate + error))


def test_certain_and_sampled_rows_add_up():
    """The mean over many draws of 16 of 40 even rows, beside 2 that are certain, is the error of
    all 42.
    """
    certain, others = rows(2, 0), rows(40, 2)
    error = total(certain) + total(others)
    approximate = 100 * np.random.default_rng(1).normal(
        size=(3, 4)
    )  # large: its norm is known, the ratio unbiased

    @quick_jit
    def one(key):
        index = jax.random.randint(key, (16,), 0, 40)
        terms = Terms(*(z[:, index] for z in others))
        return (
            relative.relative_error(terms, jnp.full(16, 40.0), certain, jnp.asarray(approximate))
            ** 2
        )

    squares = jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))
    want = (np.linalg.norm(error) / np.linalg.norm(approximate + error)) ** 2
    assert float(squares.mean()) == pytest.approx(want, rel=0.2)


def test_an_error_that_one_row_makes_is_seen():
    """82 % of this error lie in one query of 512, which 64 draws meet once or so: pairs of draws
    put it at 9 %.
    """
    p = minilm.problem(0, 9, noise=1.0)
    result = GRADIENT(p, ll.Nystrom(256))
    true = arrays(GRADIENT(p, ll.Exact()).gradient)
    error = max(
        np.linalg.norm(x - true[n]) / np.linalg.norm(true[n])
        for n, x in arrays(result.gradient).items()
    )
    said = max(float(x) for x in arrays(result.relative_error).values())
    assert error > 3
    assert said > 1
    assert bool(result.failed)
