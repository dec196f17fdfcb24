"""Sampled rows of causal, rotary, padded and packed problems: all rows together are the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.estimate import masked_rows
from lora_limits.gradients import by_rows, by_rows_error
from lora_limits.heads.tokens import settled
from tests.support import masked_reference
from tests.support.masked_problems import L, having
from tests.support.tools import arrays, assert_close, later, quick_jit

BLOCK = 4


def every_row(p, method):
    p = settled(p)
    rows = by_rows.rows_of(p, method)
    head = by_rows_error.head_of(p, rows)
    kernel = by_rows_error.kernel_of(p, method, rows)
    index = jnp.arange(L, dtype=jnp.int32)
    errors = masked_rows.row_errors(p, head, by_rows_error.sees_of(p), kernel, index)
    return jax.tree.map(lambda x: x.sum(0), errors), ll.gradient(p, method).gradient


RUN = quick_jit(every_row, static_argnums=1)
CASES = [
    (("causal", "rotations", "segments", "query_mask", "key_mask"), "taylor", True),
    (("partial rotations", "key_mask"), "taylor", True),
    (("query_mask", "rotations"), "chebyshev", True),
    *later(
        (("causal",), "taylor", True),
        (("segments",), "taylor", True),
        (("causal", "rotations"), "taylor", False),
        (("rotations",), "fitted", True),
    ),
]


@pytest.mark.parametrize(("names", "series", "centred"), CASES)
def test_the_shares_of_all_queries_are_the_error(names, series, centred):
    p = having(*names, reach=1.5)
    method = ll.Polynomial(2, series, centred=centred, block_size=BLOCK)
    total, got = RUN(jax.tree.map(jnp.asarray, p), method)
    want = masked_reference.loss_and_gradient(p)[1]
    error = jax.tree.map(lambda x, y: x - y, want, got)
    size = max(np.abs(x).max() for x in arrays(error).values())
    assert size > 1e-4
    assert_close(total, error, 1e-10)


def test_the_estimate_holds_the_error_in_its_interval():
    p = having("causal", "rotations", "query_mask", reach=1.5)
    method = ll.Polynomial(2, block_size=BLOCK)
    want = masked_reference.loss_and_gradient(p)[1]
    batch = quick_jit(jax.vmap(lambda p, key: ll.gradient(p, method, rows=64, key=key), (None, 0)))
    found = batch(p, jax.random.split(jax.random.key(0), 64))
    for name, half in ((n, h) for n in want for h in "ab"):
        estimate = getattr(found.estimate[name], half)
        error = getattr(want[name], half) - getattr(found.gradient[name], half)[0]
        top = np.abs(error).max()
        inside = (estimate.low <= top) & (top <= estimate.high)
        assert inside.mean() > 0.9, (name, half)
        # unbiased: the mean of 64 estimates is within five standard errors
        away = np.abs(estimate.error.mean(0) - error)
        assert (away <= 5 * estimate.error.std(0) / 8 + 1e-12).all(), (name, half)
