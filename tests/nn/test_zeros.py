"""Adapters that add nothing, known to be zeros when a program is compiled.

XLA's CPU compiler (jax 0.10.2) makes NaN of softmax(q q^T) q with q = x w + (x 0) 0 in one program
at these lengths, in single precision: no way through the library may be such a program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from tests.support.tools import later

INPUTS, WIDTH, RANK = 384, 4, 2
LENGTHS = [4096, *later(8192)]


def tokens(length):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(length, INPUTS)), np.float32)
    return x, np.asarray(rng.normal(size=(INPUTS, WIDTH)) / INPUTS**0.5, np.float32)


def problem(x, w, adapter):
    names = ("query", "key", "value")
    return ll.LoRAProblem(
        x,
        x,
        x,
        x[:, :WIDTH],
        weights=ll.AttentionWeights(w, w, w),
        adapters=dict.fromkeys(names, adapter),
        scale=1.0,
        beta=0.5,
    )


@pytest.mark.parametrize("method", [ll.Exact(512), *later(ll.Exact(), ll.Polynomial(2))], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_gradient_at_zeros_that_are_constants(length, method):
    """Loss and gradients, beside those of zeros that the program is given."""
    x, w = tokens(length)
    shapes = (RANK, WIDTH), (INPUTS, RANK)
    given = ll.Adapter(*(np.zeros(shape, np.float32) for shape in shapes))

    def run(x, w, adapter):
        p = problem(x, w, adapter)
        return ll.loss(p), ll.gradient(p, method).gradient

    def constant(x, w):
        return run(x, w, ll.Adapter(*(jnp.zeros(shape, jnp.float32) for shape in shapes)))

    got = jax.jit(constant)(x, w)
    want = jax.jit(run)(x, w, given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * (1 + np.abs(b).max()))


@pytest.mark.parametrize("method", [ll.Exact(512), *later(ll.Exact(), ll.Polynomial(2))], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_at_zeros_that_are_constants(length, method):
    x, w = tokens(length)

    def run(x, w):
        lost = (x @ jnp.zeros((INPUTS, RANK), x.dtype)) @ jnp.zeros((RANK, WIDTH), x.dtype)
        q = (x @ w + lost)[None, :, None]
        return ll.attention(q, q, q, method=method)

    q = (x @ w)[None, :, None]
    want = jax.jit(lambda q: ll.attention(q, q, q, method=method))(q)
    np.testing.assert_allclose(jax.jit(run)(x, w), want, rtol=1e-4, atol=1e-4)
