"""Packed documents: no token sees one of another document, by any route or block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.polynomial import series
from tests.support.tools import later, quick_jit

# Runs that end in, before and after blocks of 4; one number comes twice, and is two documents.
LENGTHS = (3, 9, 1, 4, 7, 2)
NUMBERS = (5, 0, 5, 5 + 2, 1, 0)
IDS = np.repeat(NUMBERS, LENGTHS)
T = len(IDS)
DOCUMENTS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
THERE = np.arange(T) % 5 > 0


def inputs(seed=0, tokens=T, batch=2, heads=2, key_heads=1, width=3):
    rng = np.random.default_rng(seed)
    shapes = ((tokens, heads), (tokens, key_heads), (tokens, key_heads), (tokens, heads))
    return [0.6 * rng.normal(size=(batch, *shape, width)) + 0.2 for shape in shapes]


def dense(q, k, v, *, own, degree=None, block=1, first=0):
    """The formula entry by entry: exp on the diagonal blocks and in the first rows of a document,
    Taylor's polynomial elsewhere; `own` (T, S) says who sees whom.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    f = jnp.exp(s)
    if degree is not None:
        c = series.taylor(degree, s.dtype)
        p = sum(c[n] * s**n for n in range(degree + 1))
        i, j = np.ogrid[: s.shape[2], : s.shape[3]]
        f = jnp.where(((i // block == j // block) | (i < first))[None, None], f, p)
    f = jnp.where(own[None, None], f, 0)
    total = f.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", f / jnp.where(total == 0, 1, total), v)


def solved(function, arrays):
    def run(q, k, v, t):
        out, back = jax.vjp(function, q, k, v)
        return out, *back(t)

    return quick_jit(run)(*arrays)


def assert_near(got, want, tolerance=1e-11):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


SAME = DOCUMENTS[:, None] == DOCUMENTS[None]
CAUSAL = np.tri(T, dtype=bool)


@pytest.mark.parametrize(
    ("method", "options", "own"),
    [
        (ll.Exact(), {}, SAME),
        (ll.Exact(4), {"is_causal": True}, SAME & CAUSAL),
        (ll.Polynomial(2, block_size=8), {"is_causal": True}, SAME & CAUSAL),
        (ll.Polynomial(2, block_size=8), {}, SAME),
        (
            ll.Polynomial(2, block_size=8),
            {"local_window_size": (5, 1)},
            SAME & np.tri(T, k=1, dtype=bool),
        ),
    ],
    ids=["exact", "exact causal", "polynomial causal", "polynomial", "window"],
)
def test_documents_are_apart(method, options, own):
    """Heads that share keys, keys masked, outputs and gradients."""
    i, j = np.ogrid[:T, :T]
    if "local_window_size" in options:
        own = own & (j >= i - 5)
    polynomial = {}
    if isinstance(method, ll.Polynomial) and "local_window_size" not in options:
        polynomial = {"degree": 2, "block": 4}  # a block is of 8 queries, 2 to a token
    arrays = inputs()
    options = options | {"query_segment_ids": np.tile(IDS, (2, 1)), "mask": THERE}
    got = solved(functools.partial(ll.attention, method=method, **options), arrays)
    want = solved(functools.partial(dense, own=own & THERE[None], **polynomial), arrays)
    assert_near(got, want)


@pytest.mark.parametrize(
    ("degree", "causal"), [(3, True), *later((4, True), (4, False)), (3, False)]
)
def test_the_first_rows_of_each_document_are_exact_at_odd_degrees(degree, causal):
    """Causal, of documents longer than 128 tokens, in blocks of 32; else shorter ones as a whole."""
    tokens = 420
    start = 150 if causal else 120
    document = (np.arange(tokens) >= start).astype(np.int32)
    i, j = np.ogrid[:tokens, :tokens]
    own = (document[:, None] == document[None]) & ((j <= i) | (not causal))
    arrays = inputs(1, tokens, batch=1, heads=1)
    method = ll.Polynomial(degree, block_size=32)
    options = {"is_causal": causal, "query_segment_ids": document}
    got = solved(functools.partial(ll.attention, method=method, **options), arrays)
    at = np.arange(tokens) - np.where(document == 1, start, 0)
    exact = dense(*(jnp.asarray(x) for x in arrays[:3]), own=own)
    few = at < 128 if causal else document == 0
    apart = np.abs(got[0] - exact)[0].max((1, 2))
    if degree % 2:
        assert apart[few].max() < 1e-12
    assert 1e-9 < apart[~few].max() < 0.1


def test_packed_or_one_by_one_is_the_same():
    """To a polynomial of a degree at which both are near the exact one; Exact to rounding."""
    arrays = inputs(2)[:3]
    ends = np.cumsum(LENGTHS)
    for method, tolerance in ((ll.Exact(), 1e-12), (ll.Polynomial(8, block_size=8), 1e-4)):
        call = functools.partial(ll.attention, method=method, is_causal=True)
        packed = call(*arrays, query_segment_ids=IDS)
        for first, last in list(zip(ends - LENGTHS, ends, strict=True))[1::3]:
            alone = ll.attention(
                *(x[:, first:last] for x in arrays), method=ll.Exact(), is_causal=True
            )
            np.testing.assert_allclose(packed[:, first:last], alone, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "causal"),
    [
        (ll.Exact(), True),
        (ll.Polynomial(2, block_size=8), True),
        (ll.Polynomial(2, block_size=8), False),
        *later((ll.Exact(), False)),
    ],
    ids=str,
)
def test_nothing_that_is_not_finite_comes_from_another_document(method, causal):
    q, k, v, t = inputs(3)
    spoiled = DOCUMENTS == 2
    options = {"is_causal": causal, "query_segment_ids": IDS}

    def run(z):
        arrays = [np.where(spoiled[None, :, None, None], z, x) for x in (q, k, v)]
        cotangent = np.where(spoiled[None, :, None, None], 0, t)
        return solved(
            functools.partial(ll.attention, method=method, **options), (*arrays, cotangent)
        )

    want = run(0.0)
    for z in (np.nan, np.inf):
        for x, y in zip(run(z), want, strict=True):
            np.testing.assert_array_equal(x[:, ~spoiled], y[:, ~spoiled])
            assert np.isfinite(x[:, ~spoiled]).all()


def test_queries_and_keys_packed_each_in_its_own_way():
    q, k, v, t = inputs(4)
    own, other = np.arange(T) // 6, (np.arange(T) * 5 // T)[::-1]
    options = {"query_segment_ids": np.tile(own, (2, 1)), "key_value_segment_ids": other}
    got = solved(functools.partial(ll.attention, method=ll.Exact(4), **options), (q, k, v, t))
    want = solved(functools.partial(dense, own=own[:, None] == other[None]), (q, k, v, t))
    assert_near(got, want)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ll.Skeleton(3), {}, "method of packed documents: got Skeleton"),
        (ll.Polynomial(2, "fitted", block_size=4), {}, "series of a Polynomial on packed doc"),
        (
            ll.Polynomial(2, block_size=4),
            {"key_value_segment_ids": IDS + 1},
            "method of packed documents: got Polynomial",
        ),
        (
            ll.Exact(),
            {"key_value_segment_ids": IDS + 1, "is_causal": True},
            "key_value_segment_ids: got another array",
        ),
    ],
)
def test_what_documents_cannot_have_is_refused(method, options, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message):
        ll.attention(q, k, v, method=method, query_segment_ids=IDS, **options)
