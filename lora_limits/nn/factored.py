"""Attention in which every query sees every key, and its derivative, through any factor of f
(factors/).

out = f~ V,  rho_i = <g_i, out_i>,  p~ = f~ o (g V^T - rho 1^T)      g: the cotangent of out
dQ = p~ K,   dK = p~^T Q,   dV = f~^T g                              for scores Q K^T
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_limits import factors
from lora_limits.factors import factor as moments
from lora_limits.factors import scores


def _forward(method, q, k, v, exists) -> tuple[jax.Array, Any]:
    f, _, smallest = factors.factorise(*scores.of_rows(q, k, exists), method)
    out = jnp.where(smallest > 0, moments.apply(f, v), jnp.nan)
    return out, (f, q, k, v, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head(
    method: factors.FactorMethod, q: jax.Array, k: jax.Array, v: jax.Array, exists: jax.Array
) -> jax.Array:
    """f~ V for scores q k^T: (n, d), (S, d), (S, d_value), (S,) booleans -> (n, d_value).

    O(L rank d d_value) time beside that of the factor, O(L (rank + d) + rank d d_value) memory,
    derivative included. NaN where a row sum of the factor is not positive.
    """
    return _forward(method, q, k, v, exists)[0]


def _backward(method, kept, g):
    del method
    f, q, k, v, out = kept
    c = jnp.concatenate([g, -(g * out).sum(1, keepdims=True)], 1)
    h = jnp.concatenate([v, jnp.ones_like(v[:, :1])], 1)
    # p~ 1 = 0: centred keys give the same, with less cancellation
    dq = moments.kernel(f, c, h, k - k.mean(0, keepdims=True))
    return dq, moments.kernel_transposed(f, c, h, q), moments.apply_transposed(f, g), None


head.defvjp(_forward, _backward)
