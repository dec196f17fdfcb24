"""What stands in padded tokens, and in tokens to come, reaches nothing: NaN and infinity included."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from tests.support.tools import later, quick_jit

B, T, REAL, N, K, H = 2, 28, 19, 2, 1, 3
THERE = np.arange(T) < REAL
METHODS = [
    ll.Exact(),
    ll.Exact(8),
    ll.Polynomial(3, block_size=8),
    ll.Polynomial(2, "chebyshev", block_size=8),
    ll.Polynomial(2, "fitted", block_size=8),
    ll.Skeleton(5),
    ll.SparseLowRank(4, 4),
    ll.Nystrom(4),
    ll.RandomFeatures(8),
    ll.AdaptedMonomials(20),
    ll.BlockTree(4, 4),
    ll.Svd(5),
]
CAUSAL = [ll.Exact(), ll.Exact(8), ll.Polynomial(2, block_size=8), ll.Polynomial(3, block_size=8)]
SLOW = [
    ll.Exact(8),
    METHODS[4],
    ll.RandomFeatures(8),
    ll.Svd(5),
    ll.AdaptedMonomials(20),
    ll.Nystrom(4),
]
FILLINGS = (3.0, 10.0, 100.0, 1e20, np.nan, np.inf)


def tokens(seed=0, queries=T, keys=T):
    """(query, key, value, cotangent), with a common bias that centring would find."""
    rng = np.random.default_rng(seed)
    shapes = ((B, queries, N, H), (B, keys, K, H), (B, keys, K, H), (B, queries, N, H))
    q, k, v, t = (rng.normal(size=shape) for shape in shapes)
    return 0.5 * q + 0.6, 0.5 * k - 0.4, v + 1, t


def filled(x, there, z):
    return np.where(there[None, :, None, None], x, z)


@functools.cache
def solver(method, **options):
    def run(q, k, v, t, masks):
        call = functools.partial(ll.attention, method=method, **options, **masks)
        out, back = jax.vjp(call, q, k, v)
        return out, *back(t)

    return quick_jit(run)


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("method", "causal"),
    [
        *((m, False) for m in METHODS if m not in SLOW),
        *((m, True) for m in CAUSAL if m not in SLOW),
        *later(*((m, False) for m in SLOW), (ll.Exact(8), True)),
    ],
    ids=str,
)
def test_padding_reaches_nothing(method, causal):
    """Outputs and gradients of real tokens, bit for bit, whatever padded queries, keys and values
    hold; there is no output that is not finite.
    """
    run = solver(method, is_causal=causal)
    q, k, v, t = tokens()
    t = filled(t, THERE, 0)
    masks = {"mask": np.tile(THERE, (B, 1))}
    want = run(*(filled(x, THERE, 0.0) for x in (q, k, v)), t, masks)
    for z in FILLINGS:
        got = run(*(filled(x, THERE, z) for x in (q, k, v)), t, masks)
        assert_same([x[:, :REAL] for x in got], [x[:, :REAL] for x in want])
        assert all(np.isfinite(x).all() for x in got)
        assert all((np.asarray(x[:, REAL:]) == 0).all() for x in got[1:])


@pytest.mark.parametrize(
    "method",
    [METHODS[2], METHODS[3], *later(ll.Exact(8), METHODS[4], ll.AdaptedMonomials(20), ll.Svd(4))],
    ids=str,
)
def test_padding_is_as_if_it_were_not_there(method):
    """The same as of the shorter sequence: centres, balance and ranges are those of real tokens."""
    q, k, v, t = tokens(1)
    t = filled(t, THERE, 0)
    masks = {"mask": np.tile(THERE, (B, 1))}
    got = solver(method)(q, k, v, t, masks)
    want = solver(method)(*(x[:, :REAL] for x in (q, k, v, t)), {})
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x[:, :REAL], y, rtol=0, atol=1e-9 * np.abs(y).max())


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2], METHODS[5]], ids=str)
def test_queries_have_a_mask_and_lengths_of_their_own(method):
    """Where there are not as many queries as keys; lengths say the same as masks; outputs are 0."""
    queries = T + 5
    q, k, v, t = tokens(2, queries=queries)
    asked = np.arange(queries) < 11
    run = solver(method)
    masks = {"query_mask": np.tile(asked, (B, 1)), "mask": np.tile(THERE, (B, 1))}
    want = run(q, k, v, t, masks)
    assert (np.asarray(want[0][:, 11:]) == 0).all()
    assert (np.asarray(want[1][:, 11:]) == 0).all()
    lengths = {
        "query_seq_lengths": np.full(B, 11, np.int32),
        "key_value_seq_lengths": np.full(B, REAL, np.int32),
    }
    arrays = (filled(q, asked, np.nan), filled(k, THERE, np.nan), filled(v, THERE, np.inf))
    assert_same(run(*arrays, t, lengths), want)


def test_equal_lengths_by_chance_are_answered():
    """Cross-attention of as many queries as keys: a mask of keys takes no answer away."""
    q, k, v, t = tokens(3)
    masks = {"mask": np.tile(THERE, (B, 1))}
    everyone = masks | {"query_mask": np.ones((B, T), bool)}
    for method, tolerance in ((ll.Exact(), 1e-12), (ll.Polynomial(6, block_size=8), 1e-2)):
        out = solver(method)(q, k, v, t, masks)[0]
        want = solver(ll.Exact())(q, k, v, t, everyone)[0]
        np.testing.assert_allclose(out, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", [*CAUSAL[:3], *later(CAUSAL[3])], ids=str)
def test_nothing_that_is_not_finite_comes_from_the_future(method):
    """Outputs bit for bit and gradients of the past, whatever is to come; from then on NaN."""
    run = solver(method, is_causal=True)
    # In single precision features of large numbers overflow.
    q, k, v, t = (np.asarray(x, np.float32) for x in tokens(4))
    everywhere = [*itertools.product((np.nan, np.inf, -np.inf, 1e6), range(3))]
    for present in (3, 16):
        past = np.arange(T) < present
        cotangent = filled(t, past, 0)
        want = run(q, k, v, cotangent, {})
        for z, changed in (*everywhere, (1e20, 0), (1e30, 2)):
            arrays = [filled(x, past, z) if n == changed else x for n, x in enumerate((q, k, v))]
            arrays = [np.asarray(x, np.float32) for x in arrays]
            got = run(*arrays, np.asarray(cotangent, np.float32), {})
            assert_same([x[:, :present] for x in got], [x[:, :present] for x in want])
            if not np.isfinite(z):
                assert np.isnan(got[0][:, present:]).all()


def test_a_whole_entry_of_padding_gives_nothing():
    q, k, v, t = tokens(5)
    masks = {"mask": np.stack([np.zeros(T, bool), THERE])}
    for method in (METHODS[2], METHODS[3], METHODS[5]):
        got = solver(method)(q, k, v, filled(t, THERE, 0), masks)
        assert all((np.asarray(x[0]) == 0).all() for x in got)
        assert all(np.isfinite(x).all() for x in got)


def test_odd_degrees_train_on_few_keys():
    """One key scores -3: 1 + s is negative, and so would be the sum over a first row of few keys."""
    x = np.full((1, 150, 1, 1), np.sqrt(3.0))
    sign = np.where(np.arange(150) % 2 == 0, -1.0, 1.0)[None, :, None, None]
    run = solver(ll.Polynomial(1, block_size=1), is_causal=True, scale=1.0)
    got = run(x * sign, x, x, np.ones_like(x), {})
    assert np.isfinite(np.asarray(got[0][:, :128])).all()
    want = solver(ll.Exact(), is_causal=True, scale=1.0)(x * sign, x, x, np.ones_like(x), {})
    np.testing.assert_allclose(got[0][:, :128], want[0][:, :128], rtol=1e-12)
    assert jnp.isnan(got[0][:, 128:]).any()  # where it is beyond a polynomial, it says so
