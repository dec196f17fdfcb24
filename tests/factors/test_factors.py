"""Factors of f: the gradient that takes any of them, what each is on its own, and failures that say
so.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from experiments.problems import minilm
from lora_limits.coordinates import frame as frames
from lora_limits.factors import adapted, factor, kernel, random_features
from lora_limits.factors.method import coordinates, factorise
from lora_limits.gradients import chain
from lora_limits.problem import projections
from tests.support import reference
from tests.support.compiled import GRADIENT
from tests.support.tools import arrays, assert_close, later, quick_jit

GRADIENT_OF = quick_jit(kernel.factored_gradient)
FACTOR = quick_jit(
    lambda p, method: factorise(coordinates(p, frames.of_problem(p)), method), static_argnums=1
)


def exact_rows(p):
    """f, from the definition."""
    s = reference.scores(p)
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def dense(p, f):
    """{"query.a": array, ...} with f~ in place of f in Lemmas 3.1, 3.2 and D.4, in NumPy."""
    q, k, v = (np.asarray(x) for x in projections(p))
    out = f @ v
    c = out - np.asarray(p.target)
    kernel = f * (c @ v.T - (c * out).sum(1, keepdims=True))
    rows = {"query": p.beta * kernel @ k, "key": p.beta * kernel.T @ q, "value": f.T @ c}
    x = {"query": p.x_query, "key": p.x_key, "value": p.x_value}
    got = {}
    for n, (a, b) in ((n, (z.a, z.b)) for n, z in p.adapters.items()):
        got[n] = ll.Adapter(
            p.scale * (x[n] @ b).T @ rows[n], p.scale * x[n].T @ (rows[n] @ np.asarray(a).T)
        )
    return got


def any_factor(lq, lk, rng):
    """Low rank, entries in blocks of 3 with padding among them, and two rows: a Factor and its
    dense form.
    """
    blocks = -(-lq // 3)
    query = np.concatenate([rng.permutation(lq), np.full(blocks * 3 - lq, lq)]).reshape(blocks, 3)
    key = np.stack([rng.permutation(lk + 1)[:4] for _ in range(blocks)])
    value = rng.normal(size=(blocks, 3, 4)) * (query < lq)[..., None] * (key < lk)[:, None]
    left, right = rng.uniform(1, 2, size=(lq, 2)), rng.uniform(1, 2, size=(lk, 2))
    worst, written = np.array([2, 0]), rng.uniform(size=(2, lk))
    left[worst] = 0
    f = left @ right.T
    for b, i, j in itertools.product(range(blocks), range(3), range(4)):
        if query[b, i] in worst:
            value[b, i, j] = 0
        if query[b, i] < lq and key[b, j] < lk:
            f[query[b, i], key[b, j]] += value[b, i, j]
    f[worst] += written
    entries = factor.Entries(*(jnp.asarray(x) for x in (query, key, value)))
    rows = factor.Rows(jnp.asarray(worst), jnp.asarray(written))
    return factor.Factor(jnp.asarray(left), jnp.asarray(right), entries, rows), f


# fewer and more than half the columns of Q
@pytest.mark.parametrize(
    ("adapt", "rank"),
    [
        (("query",), 1),
        (("key", "value"), 3),
        *later((("query",), 3), (("key", "value"), 1), (problems.FULL, 1)),
        (problems.FULL, 3),
    ],
)
def test_the_gradient_of_a_factor_is_that_of_its_dense_form(adapt, rank):
    p = problems.make(0, shape=dataclasses.replace(problems.CROSS, rank=rank), adapt=adapt)
    given, f = any_factor(11, 17, np.random.default_rng(1))
    f = f / f.sum(1, keepdims=True)
    normalised, total = factor.normalise(given)
    loss, got = GRADIENT_OF(p, normalised)
    assert_close(got, dense(p, f), 1e-12)
    assert float(loss) == pytest.approx(
        0.5 * ((f @ np.asarray(projections(p)[2]) - p.target) ** 2).sum()
    )
    index = jnp.asarray([0, 2, 7, 10, 7])
    assert np.asarray(factor.rows_of(normalised, index)) == pytest.approx(f[np.asarray(index)])
    assert total.shape == (11,)


def test_a_row_that_is_dropped_is_gone_whatever_was_in_it():
    given, f = any_factor(11, 17, np.random.default_rng(1))
    lost = given._replace(left=given.left.at[5].set(jnp.nan))
    lost = lost._replace(
        entries=lost.entries._replace(
            value=jnp.where((lost.entries.query == 5)[..., None], jnp.inf, lost.entries.value)
        )
    )
    z = np.random.default_rng(2).normal(size=(17, 2))
    got = factor.apply(factor.drop_rows(lost, jnp.arange(11) == 5), jnp.asarray(z))
    f[5] = 0
    np.testing.assert_allclose(got, f @ z, atol=1e-12)


def test_masked_keys_take_no_part_in_the_landmarks():
    """Two segments of five keys, and of the same five with two masked among them."""
    x, y = (np.random.default_rng(n).normal(size=(10 - n, 4)) for n in (1, 0))
    x[:, -1] = 1
    masked = [1, 4, 8, 12]
    holes = np.insert(y, [1, 3, 6, 9], 0.0, axis=0)
    holes[masked, -1] = frames.NOWHERE
    got, want = (factor_of(jnp.asarray(x), jnp.asarray(z)) for z in (holes, y))
    np.testing.assert_allclose(np.delete(got, masked, 1), want, rtol=1e-9)
    assert not got[:, masked].any()


def factor_of(x, y):
    """f~ of two landmarks, written out."""
    found = ll.Nystrom(2).factor(x, y)[0]
    return np.asarray(found.left @ found.right.T)


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (ll.Svd(50), "cross"),
        (ll.SparseLowRank(50, 3), "cross"),
        *later((ll.SparseLowRank(50, 3), "one key")),
    ],
    ids=str,
)
def test_a_factor_wide_enough_gives_the_exact_gradient(method, shape):
    p = problems.make(3, shape=problems.SHAPES[shape])
    result = GRADIENT(p, method)
    want = {n: ll.Adapter(*ab) for n, ab in reference.loss_and_gradient(p)[1].items()}
    assert_close(result.gradient, want, 1e-9)
    assert not bool(result.failed)
    assert result.bound is None


@functools.cache
def tame(length=96):
    return ll.random_problem(
        jax.random.key(0), length=length, width=4, rank=2, gamma=1.2, adapt=problems.FULL
    )


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        (ll.Svd(12), 0.03),
        (ll.Skeleton(24), 0.01),
        (ll.Nystrom(48), 1e-2),
        (ll.SparseLowRank(8, 24), 0.05),
        (ll.AdaptedMonomials(70), 1e-2),
        (ll.RandomFeatures(2000), 0.5),
    ],
    ids=str,
)
def test_each_factor_approximates_the_gradient_of_a_tame_problem(method, limit):
    p = tame()
    result = GRADIENT(p, method)
    true = {n: np.asarray(x) for n, x in arrays(GRADIENT(p, ll.Exact()).gradient).items()}
    for name, x in arrays(result.gradient).items():
        assert np.linalg.norm(x - true[name]) < limit * np.linalg.norm(true[name]), name
    assert not bool(result.failed)
    assert float(result.normaliser) > 0
    assert result.rank == method.rank + getattr(method, "entries", 0)


def test_no_factor_is_better_in_frobenius_norm_than_the_svd():
    p = tame()
    f = exact_rows(p)
    s = np.linalg.svd(f, compute_uv=False)
    for method in (ll.Svd(6), ll.Skeleton(6), ll.AdaptedMonomials(6)):
        got, _, _ = FACTOR(p, method)
        error = np.linalg.norm(np.asarray(got.left @ got.right.T) - f)
        floor = np.sqrt((s[6:] ** 2).sum())
        assert error >= floor * (1 - 1e-9)
        if isinstance(method, ll.Svd):  # dividing by row sums costs a little
            assert error < 1.05 * floor


def test_all_monomials_of_a_degree_make_the_polynomial_factor():
    p = tame()
    got, _, _ = FACTOR(p, ll.AdaptedMonomials(math.comb(4 + 3, 3), degree=3))
    u, v = quick_jit(chain.polynomial_factor, static_argnums=1)(p, 3)
    assert np.asarray(got.left @ got.right.T) == pytest.approx(
        np.asarray(u @ v.T), rel=1e-8, abs=1e-12
    )


def test_the_largest_terms_are_found_in_order():
    size = np.array([0.9, 0.5, 0.2])
    powers = [a for a in itertools.product(range(5), repeat=3) if sum(a) <= 4]
    value = {a: np.prod(size ** np.array(a)) / math.prod(map(math.factorial, a)) for a in powers}
    best = sorted(value, key=lambda a: -value[a])[:12]
    index, log = adapted.largest_terms(jnp.asarray(size), 12, 4)
    found = [tuple(int((row == i).sum()) for i in range(3)) for row in np.asarray(index)]
    assert found == best
    assert np.exp(np.asarray(log)) == pytest.approx([value[a] for a in best])


def test_random_features_are_unbiased_for_exp():
    x, y = np.array([0.5, -0.3]), np.array([0.2, 0.7])
    w = np.asarray(random_features.orthogonal_frequencies(jax.random.key(0), 100_000, 2))
    draws = np.exp(w @ x - x @ x / 2) * np.exp(w @ y - y @ y / 2)
    assert draws.mean() == pytest.approx(np.exp(x @ y), abs=5 * draws.std() / len(draws) ** 0.5)


def error(p, result):
    true = arrays(GRADIENT(p, ll.Exact()).gradient)
    return {
        n: np.linalg.norm(x - true[n]) / np.linalg.norm(true[n])
        for n, x in arrays(result.gradient).items()
    }


@pytest.mark.parametrize("method", [ll.SparseLowRank(64, 64), *later(ll.Skeleton(24))], ids=str)
def test_a_lost_head_is_never_returned_as_if_it_were_fine(method):
    lost = kept = 0
    for layer, head in minilm.heads()[::2]:
        p = minilm.problem(layer, head, length=256, dtype="float64")
        result = GRADIENT(p, method)
        true, said = (
            error(p, result),
            {n: float(x) for n, x in arrays(result.relative_error).items()},
        )
        if max(true.values()) > 1.5:
            lost += 1
            assert bool(result.failed), (layer, head, true, said)
        if max(true.values()) < 0.3:
            kept += 1
            assert not bool(result.failed), (layer, head, true, said)
    assert kept + lost > 3


def test_a_row_sum_that_is_not_positive_is_a_failure():
    p = ll.random_problem(
        jax.random.key(0), length=96, width=4, rank=2, gamma=8.0, adapt=problems.FULL
    )
    result = GRADIENT(p, ll.AdaptedMonomials(math.comb(4 + 3, 3), degree=3))
    assert float(result.normaliser) <= 0
    assert bool(result.failed)


@pytest.mark.slow
@pytest.mark.parametrize("adapt", problems.FULL)
def test_sparse_plus_low_rank_reaches_most_real_heads(adapt):
    worst = []
    for layer, head in minilm.heads():
        p = minilm.problem(layer, head, adapt=(adapt,), dtype="float64")
        worst.append(max(error(p, GRADIENT(p, ll.SparseLowRank(128, 128))).values()))
    assert np.median(worst) < 0.08
    assert np.quantile(worst, 0.9) < 0.2


def test_no_array_of_length_by_length_is_formed():
    n = 4096
    shape = jax.eval_shape(
        lambda: ll.random_problem(jax.random.key(0), length=n, width=4, rank=2, gamma=1.0)
    )
    for method in (
        ll.SparseLowRank(16, 16),
        ll.Skeleton(16),
        ll.AdaptedMonomials(16),
        ll.RandomFeatures(16),
    ):
        jaxpr = jax.make_jaxpr(lambda p, method=method: ll.gradient(p, method))(shape)
        assert max(sizes(jaxpr.jaxpr)) <= n * 256 * 4


def sizes(jaxpr):
    """Elements of every array of a jaxpr, those of its parts included."""
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars)
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from sizes(sub)
