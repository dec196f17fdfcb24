"""Errors of every degree from sampled queries, on which the map rests: against the dense scan, against
the mean over targets, against exact gradients at length; and what their standard errors are worth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.contenders import checked_degrees, degrees, drawn_queries, sampled_degrees
from experiments.problems import boxes, token_files
from experiments.problems import conditioned as problems
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.instruments.counting import count_operations
from lora_limits.polynomial import series
from lora_limits.problem import as_jax, projections
from tests.support.compiled import UNBOUNDED
from tests.support.tools import arrays, quick_jit

DENSE = quick_jit(degrees.series_gradient)
HIGHEST = 6
LENGTH = 512
ROWS = 64


def coefficients(degree, dtype):
    return jnp.zeros(degrees.HIGHEST + 1).at[: degree + 1].set(series.taylor(degree, dtype))


@pytest.mark.parametrize("kind", ["gaussian", "large biases"])
def test_every_query_at_no_noise_is_the_dense_scan(kind):
    p = problems.make(3, shape=problems.CROSS, kind=kind, reach=1.5)
    scan = sampled_degrees.scan(p, highest=HIGHEST, noise=0.0)
    exact = arrays(UNBOUNDED(p, ll.Exact()).gradient)
    p = as_jax(p)
    for g in (0, 1, 4, HIGHEST):
        dense, normaliser = DENSE(p, coefficients(g, p.dtype))
        for name, got in arrays(dense).items():
            want = frobenius_error(got, exact[name])
            assert scan.errors[name][g] == pytest.approx(want, rel=1e-6, abs=1e-12), (name, g)
        assert scan.normaliser[g] == pytest.approx(float(normaliser), rel=1e-9)
    assert max(spread.max() for spread in scan.spread.values()) < 1e-12


def test_the_noise_of_the_target_is_averaged_exactly():
    """An error is affine in the target, so its mean square over the noise is that of the mean target
    and of each unit of noise by itself.
    """
    p = as_jax(problems.make(4, shape=problems.CROSS, reach=2.0))
    noise, degree = 0.7, 3
    scan = sampled_degrees.scan(p, highest=degree, noise=noise)
    units = np.eye(p.target.size).reshape(-1, *p.target.shape) * noise
    targets = p.target[None] + np.concatenate([0 * units[:1], units])
    c = coefficients(degree, p.dtype)

    def both(target):
        q = checked_degrees.with_target(p, target)
        return degrees.series_gradient(q, c)[0], ll.gradient(q, ll.Exact()).gradient

    rough, exact = quick_jit(jax.vmap(both))(targets)
    got, want = arrays(rough), arrays(exact)

    def mean_square(x):
        return (x[0] ** 2).sum() + ((x[1:] - x[0]) ** 2).sum()

    for name, x in want.items():
        ratio = np.sqrt(mean_square(got[name] - x) / mean_square(x))
        assert scan.errors[name][degree] == pytest.approx(ratio, rel=1e-6), name


@pytest.fixture(scope="module")
def drawn():
    """(what all queries say, what 60 draws of a few say) of one problem."""
    p = boxes.problem("gaussian", 0, length=LENGTH, width=4, rank=2, gamma=2.0)
    truth = sampled_degrees.scan(p, highest=HIGHEST, rows=LENGTH)
    keys = [jax.random.key(n) for n in range(60)]
    return truth, [sampled_degrees.scan(p, highest=HIGHEST, rows=ROWS, key=k) for k in keys]


def test_draws_are_right_on_average(drawn):
    truth, scans = drawn
    for name, want in truth.errors.items():
        got = np.array([scan.errors[name] ** 2 for scan in scans])
        off = got.mean(0) - want**2
        # of 60 draws; a little more than chance allows, for a ratio of estimates has a bias of 1 / m
        assert np.all(np.abs(off) <= 4 * got.std(0) / 60**0.5 + 0.03 * want**2), name


def test_standard_errors_cover_the_truth(drawn):
    """95 % intervals by the jackknife: a little less for ratios with long tails, and not much more."""
    truth, scans = drawn
    held = []
    widths = []
    for name, want in truth.errors.items():
        for scan in scans:
            held.append(np.abs(scan.errors[name] - want)[1:] <= 1.96 * scan.spread[name][1:])
            widths.append((scan.spread[name] / want)[1:])
    assert 0.85 <= np.mean(held) <= 0.99
    assert np.mean(widths) < 0.25


def test_queries_that_repeat_are_taken_once_each():
    p = boxes.problem("gadget", 0, length=LENGTH, width=6, rank=2, gamma=1.5)
    kinds = drawn_queries.distinct(p)
    assert len(kinds.which) == 2**3 + 1
    assert kinds.weights.sum() == LENGTH
    few = sampled_degrees.scan(p, highest=HIGHEST, noise=0.0, alike=True)
    every = sampled_degrees.scan(p, highest=HIGHEST, noise=0.0, rows=LENGTH)
    for name, want in every.errors.items():
        np.testing.assert_allclose(few.errors[name], want, rtol=1e-8)
        assert want[3] > 1e-3  # a case where something is to be seen


def test_tokens_in_single_precision_are_read_in_double(tmp_path):
    """As a stream's are, which would not fit into memory otherwise."""
    path = tmp_path / "tokens.npy"
    token_files.write(path, 0, length=64, width=3)
    narrow = token_files.whole(path, 0, rank=2, gamma=0.7)
    assert narrow.x_key.dtype == np.float32
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), narrow)
    scans = [sampled_degrees.scan(p, highest=2, rows=8) for p in (narrow, wide)]
    for name, errors in scans[1].errors.items():
        np.testing.assert_allclose(scans[0].errors[name], errors, rtol=1e-12)


def test_work_is_linear_in_the_length_and_nothing_is_as_large_as_its_square():
    def counted(length):
        p = jax.eval_shape(
            lambda key: ll.random_problem(key, length=length, width=4, rank=2, gamma=1.0),
            jax.random.key(0),
        )
        look = sampled_degrees._look.__wrapped__
        return count_operations(
            lambda p, k: look(p, None, k, highest=8, rows=32), p, jax.random.key(0)
        )

    short, long = counted(2**14), counted(2**16)
    assert long["flops"] < 4.1 * short["flops"]
    assert long["largest"] <= max(2**16 * 4, 32 * 2048 * 4)


@pytest.mark.parametrize("family", boxes.FAMILIES)
def test_a_family_reaches_its_norm_and_no_more(family):
    p = boxes.problem(family, 1, length=256, width=6, rank=2, gamma=1.7)
    report = quick_jit(ll.norm_report)(p)
    assert float(report.gamma) == pytest.approx(1.7, rel=1e-9)
    assert float(report.query) == pytest.approx(1.7, rel=1e-9)
    q, k, _ = projections(p)
    scores = np.asarray(p.beta * q @ k.T)
    assert np.abs(scores).max() <= 1.7**2 * (1 + 1e-12)
    if family == boxes.GADGET:  # where the bound is attained
        assert np.abs(scores).max() == pytest.approx(1.7**2, rel=1e-9)


def test_other_families_and_gadgets_that_do_not_fit_are_refused():
    shape = {"rank": 1, "gamma": 1.0}
    with pytest.raises(ValueError, match="family: got 'noise', expected one of uniform, "):
        boxes.problem("noise", 0, length=64, width=4, **shape)
    with pytest.raises(ValueError, match="gadget: got width 4, length 96, expected two columns"):
        boxes.problem("gadget", 0, length=96, width=4, **shape)


def test_too_few_degrees_or_rows_are_refused():
    p = boxes.problem("uniform", 0, length=8, width=2, rank=1, gamma=1.0)
    with pytest.raises(ValueError, match="highest: got 1, expected an integer of at least 2"):
        sampled_degrees.scan(p, highest=1)
    with pytest.raises(ValueError, match="rows: got 2, expected an integer of at least 3"):
        sampled_degrees.scan(p, highest=2, rows=2)


@pytest.mark.slow
def test_the_estimate_is_the_error_of_exact_gradients_at_length():
    """At 2^14 tokens, where the coherent part is as large as the noise: over three targets."""
    length = 2**14
    p = boxes.problem("gaussian", 2, length=length, width=4, rank=2, gamma=3.0)
    scan = sampled_degrees.scan(p, highest=4, rows=512)
    found = checked_degrees.measured(p, (2, 3), targets=3)
    for degree, each in found.items():
        for name, want in each.items():
            assert scan.errors[name][degree] == pytest.approx(want, rel=0.3), (name, degree)
    told = checked_degrees.beside(scan, found)["3"]
    assert 0.7 < told["lowest"] <= told["highest"] < 1.3
