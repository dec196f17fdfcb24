"""Attention for models: against a dense oracle, jax.nn's, and the promises of its docstring."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.heads.visibility import Pattern
from lora_limits.instruments.counting import count_operations
from lora_limits.nn import heads
from tests.support.dense_attention import (
    HOLES,
    SCALE,
    B,
    H,
    K,
    N,
    S,
    assert_near,
    compiled,
    distance,
    inputs,
    oracle,
    peer,
    taylor,
)
from tests.support.tools import later, quick_jit

# -------------------------------------------------------------------------------------------
# against dense formulas


@pytest.mark.parametrize(
    ("method", "causal"),
    [
        (taylor(3), False),
        (taylor(0), False),
        (taylor(2), True),
        (taylor(0), True),
        *later((taylor(2, 5, centred=False), False), (taylor(2, 1, series="chebyshev"), False)),
        *later((taylor(3, 8, series="fitted"), False), (taylor(4, 1), True)),
    ],
    ids=str,
)
def test_polynomial_attention_and_its_derivative_are_those_of_the_dense_formula(method, causal):
    """Blocks that divide no length; grouped heads; masked keys."""
    arrays = inputs(1, queries=S if causal else S + 2)
    want = compiled(method, causal, oracle)(*arrays, HOLES)
    assert_near(compiled(method, causal)(*arrays, HOLES), want, 1e-12)


@pytest.mark.parametrize("causal", [False, *later(True)])
def test_attention_converges_to_the_exact_one_with_the_degree(causal):
    arrays = inputs(2, queries=14, keys=14, width=2, value_width=2, size=0.5)
    everything = np.ones((B, 14), bool)
    want = compiled(None, causal, peer)(*arrays, everything)
    coarse, fine = (
        distance(compiled(taylor(g, 3), causal)(*arrays, everything), want) for g in (2, 5)
    )
    assert coarse > 20 * fine
    assert fine < 1e-2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", [ll.Exact(), ll.Exact(block_size=4), ll.Polynomial(2)], ids=str)
def test_exact_attention_is_that_of_jax(method, causal):
    """A polynomial whose keys fit in one block is exact. Scores up to 200 do not overflow."""
    for seed, size in ((3, 0.8), (4, 9.0)):
        arrays = inputs(seed, value_width=H, size=size)
        want = compiled(None, causal, peer)(*arrays, HOLES)
        assert_near(compiled(method, causal)(*arrays, HOLES), want, 2e-5)


@pytest.mark.parametrize(
    ("method", "keys"), [(ll.Exact(4), 5), (ll.Exact(4), 9), (taylor(4, 4), 5)], ids=str
)
def test_causal_lengths_need_not_match(method, keys):
    """Query t sees keys s <= t, whichever sequence ends first."""
    arrays = inputs(5, queries=7, keys=keys, value_width=2, width=2, size=0.05)
    want = compiled(None, True, peer)(*arrays, None)
    assert_near(compiled(method, True)(*arrays, None), want, 1e-4)


def test_scores_far_beyond_single_precision_exponents_do_not_overflow_in_the_own_block():
    """Equal tokens: every score is 150 and the answer is the mean of the values so far."""
    q = np.full((1, 6, 1, 1), 12.25, np.float32)
    v = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
    out, gradients = compiled(taylor(2, 3), True)(q, q, v, np.ones_like(v), None, 1.0)
    np.testing.assert_allclose(out[0, :3, 0, 0], [0, 0.5, 1], rtol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


# --------------------------------------------------------------------------------------------------- what is not seen


@pytest.mark.parametrize(
    ("method", "causal"),
    [(taylor(2), False), (taylor(2), True), (ll.Exact(4), False), (ll.Exact(), True)],
    ids=str,
)
def test_masked_keys_are_never_read(method, causal):
    q, k, v, t = inputs(6)
    out, gradients = compiled(method, causal)(q, k, v, t, HOLES)
    gone = ~HOLES[:, :, None, None]
    again = compiled(method, causal)(
        q, np.where(gone, np.nan, k), np.where(gone, np.inf, v), t, HOLES
    )
    for x, y in zip((out, *gradients), (again[0], *again[1]), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.isfinite(x).all()
    for g in gradients[1:]:
        assert (np.asarray(g)[~HOLES] == 0).all()
    if not causal:  # as if they were not there
        kept = [x[1:][:, HOLES[1]] for x in inputs(6)]
        want = compiled(method)(*kept, None)
        only = np.where(HOLES[:, :, None, None], t, 0)
        out, gradients = compiled(method)(q, k, v, only, HOLES)
        got = [x[1:][:, HOLES[1]] for x in (out, *gradients)]
        assert_near((got[0], got[1:]), want, 1e-12)


def test_queries_that_see_no_key_give_nothing():
    q, k, v, t = inputs(7)
    for method, causal in (
        (taylor(3), False),
        (ll.Exact(4), False),
        (taylor(2), True),
        (ll.Exact(), True),
    ):
        mask = np.stack([np.zeros(S, bool), np.arange(S) >= 5])
        out, gradients = compiled(method, causal)(q, k, v, t, mask)
        assert (np.asarray(out[0]) == 0).all()
        assert all((np.asarray(g[0]) == 0).all() for g in gradients)
        assert all(np.isfinite(g).all() for g in gradients)
        if causal:
            assert (np.asarray(out[1, :5]) == 0).all()
            assert (np.asarray(out[1, 5:]) != 0).all()


@pytest.mark.parametrize("method", [taylor(2), ll.Exact(4)], ids=str)
def test_nothing_comes_from_the_future(method):
    """Outputs bit for bit, and gradients exactly 0, whatever block the present ends in."""
    q, k, v, t = inputs(8)
    run = compiled(method, True)
    out = run(q, k, v, t, HOLES)[0]
    for present in (1, 4, 6):
        later = np.arange(S)[None, :, None, None] >= present
        moved = [np.where(later, -30 * x[:, ::-1] + 1, x) for x in (q, k, v)]
        again, gradients = run(*moved, np.where(later, 0, t), HOLES)
        np.testing.assert_array_equal(again[:, :present], out[:, :present])
        assert all((np.asarray(g[:, present:]) == 0).all() for g in gradients)
        assert all(np.isfinite(g).all() for g in gradients)
    assert np.abs(gradients[2]).max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_a_normaliser_that_is_not_positive_makes_nan_and_only_there(causal):
    """One key in twenty scores -9.5 for every other query, the rest 0.5: 1 + s + s^2/2 + s^3/6
    averages to -4.6. Causal queries see enough keys for a polynomial from the 128th on.
    """
    n = 140
    q = np.where(np.arange(n) % 2 == 0, 1.0, -1.0).reshape(1, n, 1, 1)
    k = np.where(np.arange(n) % 20 == 0, -9.5, 0.5).reshape(1, n, 1, 1)
    bad = (np.arange(n) % 2 == 0) & (np.arange(n) >= (128 if causal else 0))
    run = compiled(taylor(3, 2, centred=False), causal)
    out, gradients = run(q, k, k, np.ones_like(q), None, 1.0)
    np.testing.assert_array_equal(np.isnan(out[0, :, 0, 0]), bad)
    assert all(np.isnan(g).any() for g in gradients)
    gradients = run(q, k, k, np.where(bad[None, :, None, None], 0.0, 1.0), None, 1.0)[1]
    assert all(np.isfinite(g).all() for g in gradients)


# ------------------------------------------------------------------------------------------------------ as JAX expects


@pytest.mark.parametrize(("dtype", "causal"), [(jnp.bfloat16, True), (np.float32, False)])
def test_dtype_follows_the_inputs_and_sums_are_single_precision_at_least(dtype, causal):
    arrays = [jnp.asarray(x, dtype) for x in inputs(9)]
    wide = [np.asarray(x, np.float64) for x in arrays]
    got = compiled(taylor(2), causal)(*arrays)
    assert {x.dtype for x in (got[0], *got[1])} == {jnp.dtype(dtype)}
    assert_near(got, compiled(taylor(2), causal)(*wide), 6e-3 if dtype == jnp.bfloat16 else 2e-5)


def test_vmap_and_the_derivative_in_the_scale():
    many = [inputs(seed) for seed in (10, 11)]
    stacked = [np.stack(x) for x in zip(*many, strict=True)]

    def total(scale, q, k, v, t):
        return (ll.attention(q, k, v, method=taylor(2), scale=scale) * t).sum()

    batched = quick_jit(jax.vmap(jax.value_and_grad(total), (None, 0, 0, 0, 0)))(SCALE, *stacked)
    for i, (q, k, v, t) in enumerate(many):
        out, (dq, _, _) = compiled(taylor(2))(q, k, v, t)
        np.testing.assert_allclose(batched[0][i], (out * t).sum(), rtol=1e-12)
        np.testing.assert_allclose(batched[1][i], (dq * q).sum() / SCALE, rtol=1e-9)


def test_new_numbers_do_not_recompile():
    run = jax.jit(lambda q, k, v, s: ll.attention(q, k, v, method=ll.Exact(), scale=s))
    for seed in range(3):
        run(*inputs(seed, size=0.1 + seed)[:3], 0.1 + seed)
    assert run._cache_size() == 1


@pytest.mark.parametrize(("method", "causal"), [(taylor(3, 64), False), (taylor(3, 64), True)])
def test_memory_is_linear_in_the_tokens(method, causal):
    """No array of T x S, nor of T x k, forwards or backwards: rows of d_head or d_value numbers, or
    one block.
    """
    k, width = math.comb(4 + 3, 3), 4
    length = 2**13
    x = jax.ShapeDtypeStruct((1, length, 1, width), np.float32)

    def back(q, k, v, t):
        return jax.vjp(functools.partial(ll.attention, method=method, is_causal=causal), q, k, v)[
            1
        ](t)

    largest = count_operations(back, x, x, x, x)["largest"]  # of the way there, too
    assert largest <= (2 * width + 1) * length < k * length / 3


def test_memory_of_exact_attention_in_blocks():
    length, block = 4096, 32
    x = jax.ShapeDtypeStruct((1, length, 1, 4), np.float32)
    for causal in (False, True):

        def back(q, k, v, t, causal=causal):
            call = functools.partial(ll.attention, method=ll.Exact(block), is_causal=causal)
            return jax.vjp(call, q, k, v)[1](t)

        assert count_operations(back, x, x, x, x)["largest"] <= block * length


@pytest.mark.parametrize(
    ("platform", "causal", "width", "want"),
    [
        ("cpu", False, 4, 512),
        ("cpu", True, 64, 128),
        ("gpu", False, 4, 2**20),
        ("gpu", False, 64, 8005),
        ("gpu", True, 4, 2048),
    ],
)
def test_blocks_fit_the_platform(monkeypatch, platform, causal, width, want):
    """A cache on a CPU; on an accelerator equal parts of the input, of 2^25 entries at most."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jax.ShapeDtypeStruct((2**20, width), np.float32)
    found = heads.block_size(x, x, 2, Pattern(is_causal=causal))
    entries = max(math.comb(width + 2, 2), width * (1 + width))
    assert found == want
    assert platform == "cpu" or found * entries <= 2**25


# -------------------------------------------------------------------------------------------------------------- errors


def refused(**changes):
    q, k, v, _ = inputs()
    given = {"query": q, "key": k, "value": v, "method": ll.Exact()} | changes
    return ll.attention(given.pop("query"), given.pop("key"), given.pop("value"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ll.Chain(2)}, r"method: got Chain.*expected Exact, Polynomial or a factor"),
        ({"method": "exact"}, "method: got 'exact'"),
        (
            {"method": ll.Polynomial(2, "fitted"), "is_causal": True},
            "got 'fitted', expected 'taylor'",
        ),
        ({"query": np.ones((S, N, H))}, r"query: got shape \(9, 4, 3\), expected \(batch"),
        ({"query": np.ones((B, S, 3, H))}, "query: got 3 heads, expected a multiple of 2"),
        ({"query": np.ones((B, 0, N, H))}, r"query: got shape \(2, 0, 4, 3\)"),
        ({"query": np.ones((B, S, N, H), int)}, "query: got dtype int64"),
        ({"query": np.ones((B, S, N, H), np.float32)}, "key: got dtype float64, expected float32"),
        ({"key": np.ones((B, S, K, H + 1))}, r"key: got shape \(2, 9, 2, 4\)"),
        ({"value": np.ones((B, S + 1, K, H))}, r"value: got shape \(2, 10, 2, 3\)"),
        ({"mask": np.ones((B, S))}, "mask: got float64"),
        (
            {"mask": np.ones((B, S + 2), bool)},
            r"mask: got bool of shape \(2, 11\), expected booleans of shape \(2, 9\)",
        ),
        ({"scale": np.ones(2)}, r"scale: got shape \(2,\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_wrong_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        refused(**changes)
