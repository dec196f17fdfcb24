"""A factor of one's own, written in one file: its gradient, its estimate and attention follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.factors.factor import Factor
from lora_limits.factors.method import FactorMethod
from tests.support import reference
from tests.support.tools import assert_close, quick_jit


@dataclasses.dataclass(frozen=True)
class EveryKey(FactorMethod):
    """f itself, its rows not yet normalised: the simplest factor there is."""

    def factor(self, x, y):
        return Factor(jnp.exp(x @ y.T), jnp.eye(y.shape[0], dtype=y.dtype)), None


@dataclasses.dataclass(frozen=True)
class Uniform(FactorMethod):
    """Attention that looks at every key alike, whatever the scores."""

    def factor(self, x, y):
        return Factor(jnp.ones_like(x[:, :1]), jnp.ones_like(y[:, :1])), jnp.ones_like(x[:, 0])


def test_a_new_factor_has_a_gradient_and_an_estimate_of_its_error():
    problem = problems.make(3, reach=2.0)
    run = quick_jit(ll.gradient, static_argnames="method")
    good, bad = (run(problem, method=method) for method in (EveryKey(), Uniform()))
    want = {n: ll.Adapter(*ab) for n, ab in reference.loss_and_gradient(problem)[1].items()}
    assert_close(good.gradient, want, 1e-9)
    assert good.rank == 13
    assert not bool(good.failed)
    assert max(float(x) for x in jax.tree.leaves(good.relative_error)) < 1e-6
    # scores that matter are not seen: it says so
    assert max(float(x) for x in jax.tree.leaves(bad.relative_error)) > 0.1


def test_a_new_factor_serves_attention_and_refuses_the_causal_kind():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 12, 2, 3))
    got = ll.attention(q, k, v, method=EveryKey())
    np.testing.assert_allclose(got, ll.attention(q, k, v, method=ll.Exact()), atol=1e-9)
    mean = ll.attention(q, k, v, method=Uniform())
    np.testing.assert_allclose(mean, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-12)
    with pytest.raises(ValueError, match="a factor looks ahead"):
        ll.attention(q, k, v, method=Uniform(), is_causal=True)
