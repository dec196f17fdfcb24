"""Attention of arrays whose types say how they lie on a mesh: each device works on what it holds.

Batch entries and heads know nothing of each other, so nothing crosses devices but what tokens that
are split must tell each other. Left to the types, every reshape and gather inside would have to be
told its sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_limits.coordinates.collectives import Axis
from lora_limits.heads.visibility import Tokens


def by_device(
    attend: Callable[..., jax.Array],
    axis: Axis,
    tokens: Tokens,
    q: Any,
    k: Any,
    v: Any,
    scale: Any,
) -> jax.Array:
    """attend(axis, tokens, q, k, v, scale), with q split as its type says, the others beside it.

    q: (B, T, N, H). axis: mesh axes over which tokens are split already, in a shard_map around.
    """
    sharding: Any = jax.typeof(q).sharding
    batch, along, heads, _ = (*sharding.spec, *[None] * 4)[:4]
    if batch is None and along is None and heads is None:
        return attend(axis, tokens, q, k, v, scale)
    whole = PartitionSpec()
    rows = PartitionSpec(batch, along)
    split = PartitionSpec(batch, along, heads)
    # One head of keys serves all queries, wherever these are.
    of_keys = split if k.shape[2] > 1 else rows
    arrays = (tokens, q, k, v, scale)
    specs = (jax.tree.map(lambda _: rows, tokens), split, of_keys, of_keys, whole)
    placed = jax.tree.map(
        lambda x, spec: jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec)), arrays, specs
    )
    named = {name for part in (batch, along, heads) for name in jax.tree.leaves(part)}
    if along is not None:
        axis = tuple(jax.tree.leaves(along))
    run = jax.shard_map(
        functools.partial(attend, axis),
        mesh=sharding.mesh,
        in_specs=specs,
        out_specs=split,
        axis_names=named,
    )
    return run(*placed)
