"""Contenders on a decoder's heads: attention to the first and the last tokens against its definition."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments import factors
from experiments.contenders import decoder_factors
from experiments.contenders.sinks import Sinks
from experiments.problems import smollm2
from tests.support.tools import assert_close, quick_jit

SOLVE = quick_jit(ll.gradient, static_argnames="method")


@pytest.mark.parametrize(("window", "sinks"), [(3, 2), (5, 4), (16, 1)])
def test_a_query_sees_the_first_keys_and_the_last_ones(window, sinks):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(13, d))) for d in (4, 4, 3))
    at = np.arange(13)
    near = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    seen = near | ((at[None] < sinks) & (at[None] <= at[:, None]))
    e = np.where(seen, np.exp(np.asarray(q @ k.T)), 0)
    want = e @ np.asarray(v) / e.sum(1, keepdims=True)
    np.testing.assert_allclose(Sinks(window, sinks).outputs(q, k, v), want, atol=1e-12)


def test_wide_enough_it_is_the_exact_gradient_and_narrower_it_is_not():
    p = smollm2.problem(4, 3, length=48, dtype="float64")
    exact = SOLVE(p, method=ll.Exact()).gradient
    assert_close(SOLVE(p, method=Sinks(48)).gradient, exact, 1e-11)
    assert_close(SOLVE(p, method=Sinks(44)).gradient, exact, 1e-11)
    true = decoder_factors.true_gradient(p)
    (narrow,) = decoder_factors.errors(p, true, Sinks, [4])
    assert 0.01 < narrow["error"] < 3
    assert (narrow["estimated"], narrow["failed"]) == (None, None)


def test_methods_that_would_refuse_a_decoders_head_are_left_out():
    able = decoder_factors.able(factors.DECODER_MAKERS)
    assert "sinks" in able
    p = smollm2.problem(4, 3, length=16)
    for name, make in factors.DECODER_MAKERS.items():
        if name not in able:
            with pytest.raises(ValueError, match=r"causal|rotations"):
                ll.gradient(p, make(2))
    with pytest.raises(ValueError, match="window"):
        ll.gradient(dataclasses.replace(p, window=3), Sinks(4))
