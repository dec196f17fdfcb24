"""What sparse plus low rank is made of: trees of like points, the search for large entries,
systematic samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_limits.factors import search, sparse
from tests.support.tools import quick_jit


@pytest.mark.parametrize("n", [1, 5, 16, 33, 100])
def test_a_tree_holds_every_point_once(n):
    order = np.asarray(search.tree(jnp.asarray(np.random.default_rng(n).normal(size=(n, 3))), 16))
    assert sorted(order[order < n]) == list(range(n))
    assert order.shape[1] < 32
    assert order.shape[0] == 1 or order.shape[1] >= 16


def test_a_tree_puts_like_points_together():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(8, 5))
    kinds = rng.permutation(np.repeat(np.arange(8), 16))
    order = np.asarray(
        search.tree(jnp.asarray(centres[kinds] + 0.1 * rng.normal(size=(128, 5))), 16)
    )
    assert (kinds[order] == kinds[order[:, :1]]).all()


def test_the_search_finds_the_keys_that_matter():
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.hstack([3 * rng.normal(size=(200, 3)), np.ones((200, 1))]))
    y = jnp.asarray(np.hstack([rng.normal(size=(300, 3)), np.zeros((300, 1))]))
    found = quick_jit(search.search, static_argnums=2)(x, y, 32)
    f = np.exp(np.asarray(x @ y.T))
    f /= f.sum(1, keepdims=True)
    best = np.sort(f, 1)[:, -32:].sum(1).mean()
    query, key = np.asarray(found.query), np.asarray(found.key)
    mass = sum(f[np.ix_(q[q < 200], k)].sum() for q, k in zip(query, key, strict=True)) / 200
    assert mass > 0.9 * best
    s = np.asarray(x @ y.T)
    for q, k, score, cap in zip(
        query, key, np.asarray(found.score), np.asarray(found.cap), strict=True
    ):
        live = q < 200
        assert score[live] == pytest.approx(s[np.ix_(q[live], k)])
        assert (cap[live] <= s[q[live]].max(1)).all()


def test_systematic_samples_are_unbiased():
    rng = np.random.default_rng(0)
    pi, g = rng.uniform(size=50), rng.normal(size=50)
    pi[7] = 0
    g[7] = 0

    def one(key):
        index, weight = sparse.systematic(key, jnp.asarray(pi), 10)
        return (weight * jnp.asarray(g)[index]).sum(), (index == 7).any()

    sums, hit = jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))
    assert float(sums.mean()) == pytest.approx(g.sum(), abs=5 * float(sums.std()) / 4000**0.5)
    assert not bool(hit.any())
