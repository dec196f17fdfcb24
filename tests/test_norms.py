"""norm_report and random_problem: norms against their definitions, score bounds against the
scores.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.problem import projections

REPORT = jax.jit(ll.norm_report)


@pytest.fixture(scope="module")
def problem():
    """Self-attention with all three adapters, shifted away from the origin."""
    p = ll.random_problem(
        jax.random.key(5), length=300, width=4, rank=2, gamma=1.5, adapt=("query", "key", "value")
    )
    x = jnp.concatenate([p.x_query, jnp.ones((300, 1))], 1)
    weights = ll.AttentionWeights(
        *(
            jnp.concatenate([w, jnp.full((1, 4), 2.0)])
            for w in (p.weights.query, p.weights.key, p.weights.value)
        )
    )
    adapters = {
        n: ll.Adapter(a.a, jnp.concatenate([a.b, jnp.zeros((1, 2))])) for n, a in p.adapters.items()
    }
    return ll.LoRAProblem(
        x, x, x, p.target, weights=weights, adapters=adapters, scale=p.scale, beta=p.beta
    )


def test_norms_are_those_of_the_theorems(problem):
    report = REPORT(problem)
    q, k, _ = (np.asarray(x) for x in projections(problem))
    a = problem.adapters
    w_k = np.asarray(problem.weights.key + problem.scale * a["key"].b @ a["key"].a)
    update = problem.scale * np.asarray(problem.x_query @ a["query"].b @ a["query"].a)
    for got, want in (
        (report.query, q),
        (report.key, k),
        (report.query_through_key, q @ w_k.T),
        (report.x_key, problem.x_key),
        (report.query_update, update),
        (report.query_centred, q - q.mean(0)),
    ):
        assert float(got) == pytest.approx(np.abs(want).max(), rel=1e-12)
    assert report.threshold == pytest.approx(math.sqrt(math.log(300)))
    assert float(report.gamma_ratio) == pytest.approx(float(report.gamma) / report.threshold)
    assert float(report.gamma_full) >= float(report.gamma) > float(report.gamma_centred)


def test_score_bounds_are_bounds_and_centring_lowers_them(problem):
    report = REPORT(problem)
    q, k, _ = (np.asarray(x) for x in projections(problem))
    s = float(problem.beta) * q @ k.T
    w = np.exp(float(problem.beta) * k @ q.mean(0))
    centred = float(problem.beta) * (q - q.mean(0)) @ (k - w @ k / w.sum()).T
    assert np.abs(s).max() <= float(report.score_bound_raw) <= 4 * np.abs(s).max()
    assert np.abs(centred).max() <= float(report.score_bound) <= 4 * np.abs(centred).max()
    assert float(report.score_bound) < 0.5 * float(report.score_bound_raw)
    assert float(report.score_ratio) == pytest.approx(float(report.score_bound) / math.log(300))


def test_score_bounds_stand_where_there_are_fewer_tokens_than_columns():
    p = ll.random_problem(jax.random.key(1), length=8, width=64, rank=2, gamma=1.0)
    report = REPORT(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p))
    assert float(report.score_bound) <= 4 * float(
        report.score_bound_raw
    )  # centring doubles a norm at most


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_random_problems_have_exactly_the_norm_asked_for(gamma):
    p = ll.random_problem(
        jax.random.key(1), length=64, width=5, rank=2, gamma=gamma, adapt=("query", "key")
    )
    q, k, _ = projections(p)
    assert float(jnp.abs(q).max()) == pytest.approx(gamma, rel=1e-12)
    assert float(jnp.abs(k).max()) == pytest.approx(gamma, rel=1e-12)
    assert p.beta == pytest.approx(1 / 5)
    assert set(p.adapters) == {"query", "key"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length: got 0"),
        ({"rank": 9}, "rank: got 9, expected at most the width"),
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"adapt": ("output",)}, "adapt: got"),
        ({"adapt": ()}, "adapt: got"),
    ],
)
def test_random_problem_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ll.random_problem(
            jax.random.key(0), **({"length": 8, "width": 4, "rank": 2, "gamma": 1.0} | change)
        )
