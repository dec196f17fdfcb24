"""Attention in which every query sees every key, and its derivative, through any factor of f.

out = f~ V,  rho_i = <g_i, out_i>,  p~ = f~ o (g V^T - rho 1^T)      g: the cotangent of out
dQ = p~ K,   dK = p~^T Q,   dV = f~^T g                              for scores Q K^T
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates import frame as frames
from lora_limits.factors.factor import apply, apply_transposed
from lora_limits.factors.kernel import kernel, kernel_transposed, with_ones, with_rho
from lora_limits.factors.method import FactorMethod, factorise


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head(
    method: FactorMethod,
    q: Float[Array, "n d"],
    k: Float[Array, "s d"],
    v: Float[Array, "s dv"],
    asked: Bool[Array, " n"],
    exists: Bool[Array, " s"],
) -> Float[Array, "n dv"]:
    """f~ V for scores q k^T. NaN where a row sum of the factor is not positive.

    asked, exists: which queries and which keys there are; 0 for queries that are not there.

    O(L rank d d_value) time beside that of the factor, O(L (rank + d) + rank d d_value) memory,
    derivative included.
    """
    return _forward(method, q, k, v, asked, exists)[0]


def _forward(method, q, k, v, asked, exists):
    frame = frames.of_rows(q, k, v, asked, exists)
    xy = frame.product(q - frame.nu[None], k - frame.mu[None], exists, asked)
    f, _, smallest = factorise(xy, method)
    out = jnp.where(smallest > 0, apply(f, v), jnp.nan)
    out = jnp.where(asked[:, None], out, 0)
    return out, (f, q, k, v, asked, out)


def _backward(method, kept, g):
    del method
    f, q, k, v, asked, out = kept
    g = jnp.where(asked[:, None], g, 0)
    c = with_rho(g, out)
    h = with_ones(v)
    # p~ 1 = 0: centred keys give the same, with less cancellation.
    dq = kernel(f, c, h, k - k.mean(0, keepdims=True))
    dk = kernel_transposed(f, c, h, q)
    dv = apply_transposed(f, g)
    return dq, dk, dv, None, None


head.defvjp(_forward, _backward)
