"""Problems as models have them: causal, windowed, rotary, padded, packed; exact gradients against
plain automatic differentiation, and what no token may change.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.gradients import exact_masked
from lora_limits.heads.tokens import pattern_of, seen_by_any, tokens_of
from lora_limits.instruments.counting import count_operations
from lora_limits.problem import projections, replaced
from tests.support import masked_reference
from tests.support.masked_problems import (
    L,
    abstract,
    assert_untouched,
    combinations,
    filled,
    having,
)
from tests.support.tools import arrays, assert_close, later, quick_jit

EXACT = quick_jit(ll.gradient, static_argnums=1)
LOSS = quick_jit(ll.loss)
METHODS = (ll.Exact(), ll.Exact(block_size=5))
ORDERS = ((), ("causal",), ("causal", "window"))


def assert_right(got, p, tolerance=1e-12):
    loss, want = masked_reference.loss_and_gradient(p)
    np.testing.assert_allclose(got.loss, loss, rtol=tolerance)
    assert_close(got.gradient, want, tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS, ids="+".join)
def test_every_combination_of_arrays_equals_automatic_differentiation(order, method):
    """One program: a batch of problems that have what each combination has, and nothing else."""
    names = [c for c in combinations() if set(order) == set(c) & {"causal", "window"}]
    many = [having(*c) for c in names if "partial rotations" not in c]
    batch = quick_jit(jax.vmap(lambda p: ll.gradient(p, method)))(
        problems.stack([filled(p) for p in many])
    )
    assert len(many) == 16
    for i, p in enumerate(many):
        assert_right(jax.tree.map(lambda x, i=i: x[i], batch), p)


ALONE = [("partial rotations",), ("window",), ("segments",)]


@pytest.mark.parametrize("names", [*ALONE, *later(*((c,) for c in combinations()))], ids="+".join)
def test_each_field_alone_and_every_combination_of_what_is_not_given(names):
    p = having(*names)
    assert_right(EXACT(p, METHODS[0]), p)
    assert_right(EXACT(p, METHODS[1]), p)
    np.testing.assert_allclose(LOSS(p), masked_reference.loss(p, p.adapters), rtol=1e-12)


def test_cross_attention_with_masks_and_rotations_of_its_own():
    shape = dataclasses.replace(problems.CROSS, width=3)
    p = problems.make(3, shape=shape, reach=2.0)
    p = dataclasses.replace(
        p,
        rotations=(ll.rotary_angles(11, 2) + 0.3, ll.rotary_angles(17, 2)),
        query_mask=np.arange(11) < 9,
        key_mask=np.arange(17) % 3 > 0,
    )
    for method in METHODS:
        assert_right(EXACT(p, method), p)


def test_a_query_that_sees_no_key_gives_zero():
    p = dataclasses.replace(having("causal"), key_mask=np.arange(L) > 4)
    for method in METHODS:
        assert_right(EXACT(p, method), p)
    blind = dataclasses.replace(having(), key_mask=np.zeros(L, bool))
    got = EXACT(blind, ll.Exact())
    np.testing.assert_allclose(got.loss, 0.5 * (blind.target**2).sum(), rtol=1e-13)
    assert all(np.all(x == 0) for x in arrays(got.gradient).values())


# ------------------------------------------------------------------------------------ what may not matter


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [("causal", "rotations"), *later((("causal", "window"),))])
def test_what_comes_after_the_queries_that_count_changes_no_bit(names, method):
    """Any prefix: the queries before t see nothing from t on, whatever it holds."""
    p = having(*names)
    late = np.arange(L) >= 7
    p = dataclasses.replace(p, query_mask=~late)
    assert_untouched(lambda p: EXACT(p, method), p, late, late)


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_other_documents_change_no_bit(method):
    p = having("key_mask", "query_mask", "segments")
    third = np.arange(L) >= 10
    p = dataclasses.replace(p, query_mask=p.query_mask & ~third)
    queries, keys = ~p.query_mask, ~p.key_mask | third
    assert_untouched(lambda p: EXACT(p, method), p, queries, keys)


def test_padding_may_hold_anything_at_the_door_and_what_counts_may_not():
    p = having("key_mask", "query_mask")
    x = p.x_key.copy()
    x[~p.key_mask] = np.nan
    y = p.target.copy()
    y[~p.query_mask] = np.inf
    kept = dataclasses.replace(p, x_key=x, target=y)
    assert np.isfinite(EXACT(kept, ll.Exact()).loss)
    x[1] = np.nan
    with pytest.raises(ValueError, match="x_key: got NaN or infinite entries"):
        dataclasses.replace(p, x_key=x)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids="+".join)
def test_the_keys_that_count_are_those_that_some_query_sees(order, segments):
    """Masks drawn at random, most queries absent."""
    p = having(*order, *(["segments"] if segments else []))
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(20):
        asked, exists = rng.random(L) < 0.2, rng.random(L) < 0.7
        p = dataclasses.replace(p, query_mask=asked, key_mask=exists)
        tokens = tokens_of(jax.tree.map(jnp.asarray, p))
        got = tokens.key & seen_by_any(pattern_of(p), tokens)
        want = masked_reference.who_sees_whom(p)[asked].any(0)
        np.testing.assert_array_equal(got, want)
        missed += (exists & ~want).sum()
    assert missed > 0


def test_a_problem_without_fields_is_the_same_program_as_ever():
    """No mask, no angle and no list of tiles in it."""
    p = problems.make(4)
    text = str(jax.make_jaxpr(lambda p: ll.gradient(p, ll.Exact(5)))(p))
    for word in ("cos", "bool[13", "bool[5,5"):
        assert word not in text


# ----------------------------------------------------------------------------------------------- the cost


def test_tiles_that_no_pair_sees_in_are_not_computed():
    n, block = 4096, 256

    def flops(**fields):
        p = abstract(n, **fields)
        return count_operations(lambda p: ll.gradient(p, ll.Exact(block)), p)["flops"]

    mask = jax.ShapeDtypeStruct((n,), np.bool_)
    full, causal = flops(key_mask=mask), flops(causal=True)
    band = flops(causal=True, window=100)
    tiles = n // block
    # of a pair: S twice, p K, p^T Q, e V, V g, e^T g; the rest is linear in the tokens
    pairs = 2 * block**2 * (4 * 8 + 3 * 8)
    assert full - causal == pairs * (tiles * (tiles - 1) // 2)
    assert causal - band == pairs * ((tiles + 1) * tiles // 2 - (2 * tiles - 1))


@pytest.mark.parametrize("names", [("causal", "rotations", "segments"), ("query_mask",)])
def test_memory_is_linear_in_the_tokens(names):
    n, block = 2**14, 512
    fields = {
        "causal": True,
        "rotations": jax.ShapeDtypeStruct((n, 4), np.float64),
        "segments": jax.ShapeDtypeStruct((n,), np.int32),
        "query_mask": jax.ShapeDtypeStruct((n,), np.bool_),
    }
    fields = {k: v for k, v in fields.items() if k in names}
    if "rotations" in fields:
        fields["rotations"] = type(having("rotations").rotations)(*[fields["rotations"]] * 2)
    p = abstract(n, **fields)
    for run in (lambda p: ll.gradient(p, ll.Exact(block)), ll.loss):
        assert count_operations(run, p)["largest"] <= max(16 * n, 512**2)


def test_only_what_the_adapters_ask_for_is_computed():
    p = abstract(1024, causal=True)
    run = lambda p: exact_masked.gradient(p, 128)  # noqa: E731
    every = count_operations(run, p)["flops"]
    one = count_operations(run, replaced(p, adapters={"value": p.adapters["value"]}))["flops"]
    tiles = 8 * 9 // 2
    # p K, p^T Q, V g
    assert every - one >= 2 * 128**2 * tiles * 3 * 8


# ------------------------------------------------------------------------------ the chain, norms, choosing


@pytest.mark.parametrize("order", [ORDERS[1], *later((ORDERS[0],), (ORDERS[2],))], ids="+".join)
def test_the_chain_nears_the_exact_gradient_of_every_combination(order):
    many = [c for c in combinations() if set(order) == set(c) & {"causal", "window"}]
    given = [having(*c, reach=0.7) for c in many if "partial rotations" not in c]
    run = quick_jit(jax.vmap(lambda p: ll.gradient(p, ll.Chain(8))))
    batch = run(problems.stack([filled(p) for p in given]))
    for i, p in enumerate(given):
        assert_right(jax.tree.map(lambda x, i=i: x[i], batch), p, 1e-6)


def test_the_chain_is_thin_and_padding_leaves_it_so():
    def largest(**fields):
        p = abstract(4096, **fields)
        return count_operations(lambda p: ll.gradient(p, ll.Chain(1)), p)["largest"]

    mask = jax.ShapeDtypeStruct((4096,), np.bool_)
    assert largest(query_mask=mask, key_mask=mask) == largest() < 4096**2
    assert largest(causal=True) >= 4096**2


REPORT = quick_jit(ll.norm_report)


@pytest.mark.parametrize(
    "names", [("causal", "rotations", "query_mask", "key_mask"), *later((("segments",),))]
)
def test_the_norms_are_of_turned_rows_that_count(names):
    p = having(*names)
    got = REPORT(p)
    q, k = (np.asarray(x) for x in projections(jax.tree.map(jnp.asarray, p))[:2])
    pairs = masked_reference.who_sees_whom(p)
    if p.query_mask is not None:
        pairs = pairs & p.query_mask[:, None]
    q, k = q[pairs.any(1)], k[pairs.any(0)]
    np.testing.assert_allclose(got.query, np.abs(q).max(), rtol=1e-13)
    np.testing.assert_allclose(got.key, np.abs(k).max(), rtol=1e-13)
    scores = p.beta * q @ k.T
    assert np.abs(scores).max() <= float(got.score_bound_raw) * (1 + 1e-12)
    centred = scores - scores.mean(0, keepdims=True)
    weights = np.exp(p.beta * k @ q.mean(0))
    mu = weights @ k / weights.sum()
    centred = p.beta * (q - q.mean(0)) @ (k - mu).T
    assert np.abs(centred).max() <= float(got.score_bound) * (1 + 1e-12)
    assert float(got.score_bound) <= 4 * np.abs(centred).max()
    # lengths are those of the rows before the rotations, max norms within the root of two
    plain = REPORT(replaced(p, rotations=None))
    np.testing.assert_allclose(got.score_bound_raw, plain.score_bound_raw, rtol=1e-12)
    assert 2**-0.5 <= float(got.query / plain.query) <= 2**0.5


def test_the_norms_of_filled_fields_are_those_of_the_plain_problem():
    p = having(reach=1.0)
    for name, got, want in zip(
        ("query", "key", "query_centred", "key_centred", "query_through_key", "x_key"),
        jax.tree.leaves(REPORT(filled(p))),
        jax.tree.leaves(REPORT(p)),
        strict=False,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=name)


def test_choose_answers_exact_where_no_polynomial_is_cheaper():
    p = having("causal", "rotations", "key_mask")
    assert ll.choose(p, 1e-3) == ll.Exact()
    narrow = having("causal", "rotations", dtype=np.float32)
    assert ll.choose(narrow, 1e-2, relative=True) == ll.Exact()
    with pytest.raises(ValueError, match="by which Exact may be rounded"):
        ll.choose(p, 1e-18)
