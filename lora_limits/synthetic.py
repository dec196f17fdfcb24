"""Random problems whose norms are set exactly, for sweeps over Gamma."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lora_limits.linalg import dot
from lora_limits.problem import NAMES, Adapter, AttentionWeights, LoRAProblem


def _signed_permutation(key: jax.Array, width: int, dtype) -> jax.Array:
    order, signs = jax.random.split(key)
    eye = jnp.eye(width, dtype=dtype)[jax.random.permutation(order, width)]
    return eye * jax.random.rademacher(signs, (1, width), dtype)


def random_problem(
    key: jax.Array,
    *,
    length: int,
    width: int,
    rank: int,
    gamma: float | jax.Array,
    adapt: Sequence[str] = ("query", "value"),
) -> LoRAProblem:
    """Self-attention whose two score factors fill the box of Theorem 3.1: max |Q| = max |K| = gamma
    exactly.

    beta = 1/width, so R <= gamma^2. Tokens are uniform on [-1, 1]^width; the adapted query and key
    projections are gamma times signed permutations (so that entries reach gamma whatever the
    width), the value projection is gaussian, the target has unit variance. scale = 1; adapters are
    small and random on both sides. Default float dtype. Raises ValueError for sizes below 1, gamma
    < 0, rank > width, or an unknown adapter.
    """
    for name, value in (("length", length), ("width", width), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if rank > width:
        raise ValueError(f"rank: got {rank}, expected at most the width {width}")
    if not isinstance(gamma, Tracer) and not gamma >= 0:
        raise ValueError(f"gamma: got {gamma}, expected a number of at least 0")
    unknown = sorted(set(adapt) - set(NAMES))
    if unknown or not adapt:
        raise ValueError(f"adapt: got {unknown or 'none'}, expected names among {list(NAMES)}")
    dtype = jnp.zeros(()).dtype
    keys = jax.random.split(key, 6)
    x = jax.random.uniform(keys[0], (length, width), dtype, -1, 1)
    x = x / jnp.abs(x).max()
    weights = {}
    adapters = {}
    for i, name in enumerate(NAMES):
        w_key, a_key, b_key = jax.random.split(keys[1 + i], 3)
        if name == "value":
            w = jax.random.normal(w_key, (width, width), dtype) / width**0.5
        else:
            w = gamma * _signed_permutation(w_key, width, dtype)
        if name in adapt:
            size = (gamma if name != "value" else 1.0) / width**0.5
            a = size * jax.random.normal(a_key, (rank, width), dtype)
            b = jax.random.normal(b_key, (width, rank), dtype) / rank**0.5
            adapters[name] = Adapter(a, b)
            w = w - dot(b, a) if name != "value" else w
        weights[name] = w
    target = jax.random.normal(keys[4], (length, width), dtype)
    return LoRAProblem(
        x,
        x,
        x,
        target,
        weights=AttentionWeights(**weights),
        adapters=adapters,
        scale=1.0,
        beta=1.0 / width,
    )
