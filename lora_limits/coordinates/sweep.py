"""Sums over tokens, block by block: the only loop that the fast gradient has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_limits.coordinates import collectives
from lora_limits.linalg import widened

Carry = TypeVar("Carry")


def sweep(
    length: int,
    block: int,
    body: Callable[[Carry, jax.Array, jax.Array], Carry],
    start: Carry,
) -> Carry:
    """Folds body(carry, first, fresh) over blocks of `block` tokens; returns the last carry.

    The last block is moved back so that it ends at the last token: no input is padded or copied.
    `fresh` (block,) is False where a token was in the block before, and the body must count that
    token as nothing. O(1) extra memory.
    """
    size = min(block, length)
    blocks = -(-length // size)

    def step(carry, i):
        first = jnp.minimum(i * size, length - size)
        fresh = first + jnp.arange(size, dtype=jnp.int32) >= i * size
        return body(carry, first, fresh), None

    return scan(step, start, jnp.arange(blocks, dtype=jnp.int32))[0]


def scan(
    body: Callable[[Carry, Any], tuple[Carry, Any]], start: Carry, xs: Any, **options: Any
) -> tuple[Carry, Any]:
    """jax.lax.scan, of which the first carry may be the same on every device of a shard_map.

    The checks of jax.shard_map want it to be said to vary where the next ones do.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        x = jax.tree.map(lambda x: x[0], xs)
        leaves, structure = jax.tree.flatten(start)
        # One part of the carry may vary because another does.
        for _ in range(len(leaves)):
            there = jax.tree.leaves(jax.eval_shape(body, start, x)[0])
            following = [collectives.varying(leaf) for leaf in there]
            if following == [collectives.varying(leaf) for leaf in leaves]:
                break
            leaves = [collectives.as_varying(*pair) for pair in zip(leaves, following, strict=True)]
            start = jax.tree.unflatten(structure, leaves)
    return jax.lax.scan(body, start, xs, **options)


def rows(
    x: Float[Array, "tokens ..."], first: Int[Array, ""], block: int, dtype: Any = None
) -> Float[Array, "n ..."]:
    """Tokens first .. first + block of x, in the precision asked for: no copy of x is made in it."""
    block_of_x = jax.lax.dynamic_slice_in_dim(x, first, min(block, x.shape[0]))
    return widened(block_of_x, dtype or x.dtype)
