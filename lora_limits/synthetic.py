"""Random problems whose norms are set exactly, for sweeps over Gamma."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from lora_limits.checks import fail
from lora_limits.instruments.compiling import quick_jit
from lora_limits.linalg import dot
from lora_limits.problem import NAMES, Adapter, AttentionWeights, LoRAProblem
from lora_limits.rotary import rotary_angles


def _signed_permutation(key: jax.Array, width: int, dtype) -> Float[Array, "width width"]:
    """One entry of +1 or -1 in every row and column: X P has the largest entry that X has."""
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
    causal: bool = False,
    rotary: bool = False,
) -> LoRAProblem:
    """Self-attention whose score factors fill the box of Theorem 3.1: max |Q| = max |K| = gamma.

    beta = 1/width, so R <= gamma^2. Tokens are (length, width), uniform on [-1, 1]; the adapted
    query and key projections are gamma times signed permutations (so that entries reach gamma
    whatever the width), the value projection is gaussian, the target has unit variance. scale = 1;
    adapters are small and random on both sides. Default float dtype. causal: a query sees the keys
    up to its own token. rotary: the first 2 floor(width / 2) coordinates are turned by rotary
    angles, which takes max |Q| and max |K| to sqrt(2) gamma at most; R stays within width gamma^2
    beta, as rotations keep lengths.
    Raises ValueError for sizes below 1, gamma < 0, rank > width, an unknown adapter, or rotary
    positions of a single coordinate.
    """
    for name, value in (("length", length), ("width", width), ("rank", rank)):
        if value < 1:
            fail(name, value, "at least 1")
    if rank > width:
        fail("rank", rank, f"at most the width {width}")
    if not isinstance(gamma, Tracer) and not gamma >= 0:
        fail("gamma", gamma, "a number of at least 0")
    # LoRAProblem would refuse it too, after the arrays were drawn.
    unknown = sorted(set(adapt) - set(NAMES))
    if unknown or not adapt:
        fail("adapt", unknown or "none", f"names among {list(NAMES)}")
    # Inside of another program it is a part of that one.
    traced = isinstance(key, Tracer) or isinstance(gamma, Tracer)
    draw = _draw if traced else _program()
    x, target, weights, adapters = draw(
        key, gamma, length=length, width=width, rank=rank, adapt=tuple(adapt)
    )
    angles = rotary_angles(length, width - width % 2) if rotary else None
    return LoRAProblem(
        x,
        x,
        x,
        target,
        weights=weights,
        adapters=adapters,
        scale=1.0,
        beta=1.0 / width,
        rotations=angles,
        causal=causal,
    )


@functools.cache
def _program():
    """`_draw` as one program.

    Compiled quickly: well compiled it would be the wait before a first look.
    """
    return quick_jit(_draw, static_argnames=("length", "width", "rank", "adapt"))


def _draw(key, gamma, *, length: int, width: int, rank: int, adapt: tuple[str, ...]):
    """(inputs, target, weights, adapters)."""
    # that of the session
    dtype = jnp.zeros(()).dtype
    keys = jax.random.split(key, 6)
    x = jax.random.uniform(keys[0], (length, width), dtype, -1, 1)
    # so that max |Q| = max |K| = gamma exactly
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
            # W* is what makes the adapted projection, W* + B A, the signed permutation.
            w = w - dot(b, a) if name != "value" else w
        weights[name] = w
    target = jax.random.normal(keys[4], (length, width), dtype)
    return x, target, AttentionWeights(**weights), adapters
