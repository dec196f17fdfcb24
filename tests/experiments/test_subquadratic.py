"""The attention of others is what its authors define: exact where it keeps every key, unbiased or
near elsewhere, and differentiable.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.contenders import baselines, subquadratic
from tests.support.tools import quick_jit

LENGTH, BETA = 64, jnp.asarray(0.5)


@pytest.fixture
def tokens():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (LENGTH, 4)) for key in keys]


def relative(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def error(attention, tokens):
    return relative(attention(*tokens, BETA), baselines.row_blocked(LENGTH)(*tokens, BETA))


@pytest.mark.parametrize(
    "attention",
    [
        subquadratic.hyper(LENGTH, 8, jax.random.key(1)),
        subquadratic.thinformer(3, jax.random.key(1)),
        subquadratic.knn(LENGTH - 1, 200, jax.random.key(1)),
    ],
    ids=["hyper", "thinformer", "knn"],
)
def test_with_every_key_attention_is_exact(attention, tokens):
    assert error(attention, tokens) < 0.02
    slope = jax.grad(lambda k: attention(tokens[0], k, tokens[2], BETA).sum())(tokens[1])
    assert bool(jnp.isfinite(slope).all())


@pytest.mark.parametrize(
    ("family", "few", "more"),
    [
        (lambda n, key: subquadratic.hyper(n, n, key), 4, 32),
        (lambda n, key: subquadratic.thinformer(n, key), 0, 2),
        (lambda n, key: subquadratic.knn(n, n, key), 4, 32),
    ],
    ids=["hyper", "thinformer", "knn"],
)
def test_more_keys_are_nearer(family, few, more, tokens):
    """On average over draws, and far from exact with few."""
    want = baselines.row_blocked(LENGTH)(*tokens, BETA)

    @functools.partial(quick_jit, static_argnums=0)
    def attend(n, key):
        return family(n, key)(*tokens, BETA)

    errors = [
        np.mean([relative(attend(n, jax.random.key(seed)), want) for seed in range(4)])
        for n in (few, more)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert errors[0] > 0.1


def test_thinned_keys_are_better_than_drawn_ones():
    """By the kernel's own distance between the mean over all keys and over the kept half."""
    keys = jax.random.split(jax.random.key(0), 2)
    k, v = (jax.random.normal(key, (512, 4)) for key in keys)
    kernel = np.asarray(jnp.exp(0.1 * k @ k.T) * (v @ v.T + (v**2).sum(1).max()))

    def distance(kept):
        weights = np.full(512, -1 / 512)
        weights[np.asarray(kept)] += 1 / len(kept)
        return weights @ kernel @ weights

    seeds = [jax.random.key(seed) for seed in range(4)]
    halve = jax.jit(subquadratic._halve)
    thinned = [distance(halve(jnp.asarray(kernel), key)) for key in seeds]
    drawn = [distance(jax.random.choice(key, 512, (256,), replace=False)) for key in seeds]
    assert np.mean(thinned) < 0.8 * np.mean(drawn)


def test_lengths_that_do_not_fit_are_refused(tokens):
    q, k, v = (x[:63] for x in tokens)
    for attention in (
        subquadratic.hyper(16, 4, jax.random.key(0)),
        subquadratic.thinformer(1, jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match="tokens: got"):
            attention(q, k, v, BETA)
