"""Factors of f for causal, rotary and padded problems: what no query sees is in no sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.estimate import masked_rows
from lora_limits.factors import masked, masked_error, prefix
from lora_limits.factors.factor import rows_of
from lora_limits.heads.tokens import sees_of, settled
from lora_limits.instruments.counting import count_operations
from tests.support import masked_reference
from tests.support.masked_problems import L, abstract, assert_untouched, having
from tests.support.tools import arrays, assert_close, later, quick_jit


@pytest.fixture
def short(monkeypatch):
    """Blocks and exact rows fewer than the tokens."""
    monkeypatch.setattr(prefix, "BLOCK", 4)
    monkeypatch.setattr(masked, "FIRST", 3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("columns", [1, 3])
def test_prefix_sums_are_those_of_the_masked_matrix(short, columns, reverse):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, L, 5))
    c, h = rng.normal(size=(2, L, 2))
    z = rng.normal(size=(L, columns))
    full = (a @ b.T) * (c @ h.T)
    want = (np.triu(full) if reverse else np.tril(full)) @ z
    rows = (jnp.asarray(x) for x in (a, c, b, h, z))
    got = prefix.prefix_kernel(*rows, reverse=reverse)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


ALL = ("causal", "rotations", "query_mask", "key_mask")
CASES = [
    (ALL, ll.Svd(L), 1e-9),
    (("rotations", "key_mask", "query_mask"), ll.Svd(L), 1e-9),
    *later(
        (ALL, ll.SparseLowRank(4, 9), 1e-3),
        (("causal",), ll.Svd(L), 1e-9),
        (("causal",), ll.Skeleton(L), 1e-5),
        (("rotations",), ll.SparseLowRank(4, 9), 1e-3),
        (ALL, ll.AdaptedMonomials(495), 1e-5),
    ),
]


@pytest.mark.parametrize(("names", "method", "tolerance"), CASES)
def test_a_factor_of_full_width_gives_the_exact_gradient(short, names, method, tolerance):
    p = having(*names, reach=1.0)
    loss, want = masked_reference.loss_and_gradient(p)
    got = quick_jit(ll.gradient, static_argnums=1)(p, method)
    np.testing.assert_allclose(got.loss, loss, rtol=tolerance)
    assert_close(got.gradient, want, tolerance)
    assert not bool(got.failed)
    assert all(x < 0.02 for x in arrays(got.relative_error).values())


@pytest.mark.parametrize("names", [ALL, *later((("rotations",),))])
def test_the_shares_of_all_queries_are_the_error_and_its_size_is_estimated(short, names):
    p = having(*names, reach=1.5)
    method = ll.Skeleton(3)

    def every_row(p):
        p = settled(p)
        made = masked.make(p, method.factor)
        got = masked.gradient(p, made).gradient
        head = masked_error.head_of(p)
        kernel = lambda s, seen, i: (rows_of(made.factor, i[None])[0],) * 2  # noqa: E731
        index = jnp.arange(L, dtype=jnp.int32)
        errors = masked_rows.row_errors(p, head, sees_of(p), kernel, index)
        return jax.tree.map(lambda x: x.sum(0), errors), got

    p = jax.tree.map(jnp.asarray, p)
    total, got = quick_jit(every_row)(p)
    want = masked_reference.loss_and_gradient(p)[1]
    error = jax.tree.map(lambda x, y: x - y, want, got)
    assert max(np.abs(x).max() for x in arrays(error).values()) > 1e-4
    assert_close(total, error, 1e-10)
    result = quick_jit(lambda p: ll.gradient(p, method, rows=512, key=jax.random.key(1)))(p)
    for name, estimated in arrays(result.relative_error).items():
        true = np.linalg.norm(arrays(error)[name]) / np.linalg.norm(arrays(want)[name])
        assert 0.7 * true < estimated < 1.4 * true, name


def test_what_comes_after_the_queries_that_count_changes_no_bit(short):
    p = having("causal", "rotations")
    late = np.arange(L) >= 7
    p = dataclasses.replace(p, query_mask=~late)
    run = quick_jit(lambda p: ll.gradient(p, ll.Skeleton(3)).gradient)
    assert_untouched(run, p, late, late)


def test_a_causal_skeleton_of_long_problems_costs_linear_time_and_memory():
    def counted(n):
        p = abstract(n, causal=True)
        return count_operations(lambda p: ll.gradient(p, ll.Skeleton(16)).gradient, p)

    one, two = counted(2**13), counted(2**14)
    assert two["flops"] < 2.01 * one["flops"]
    assert two["largest"] <= masked.FIRST * 2**14
