"""Attention of arrays whose types say how they lie on a mesh: each device works on what it holds.

Batch entries and heads know nothing of each other, so nothing crosses devices. Left to the types,
every reshape and gather inside would have to be told its sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_limits.checks import fail
from lora_limits.heads.visibility import Tokens


def by_device(
    attend: Callable[..., jax.Array], tokens: Tokens, q: Any, k: Any, v: Any, scale: Any
) -> jax.Array:
    """attend(tokens, q, k, v, scale), with q split as its type says and the others beside it.

    q: (B, T, N, H). Raises ValueError where tokens are split.
    """
    sharding: Any = jax.typeof(q).sharding
    batch, along, heads, _ = (*sharding.spec, *[None] * 4)[:4]
    if along is not None:
        remedy = "batch or heads split alone: gather the tokens (jax.sharding.reshard)"
        fail("query", f"tokens split over {along!r}", remedy)
    if batch is None and heads is None:
        return attend(tokens, q, k, v, scale)
    whole = PartitionSpec()
    rows = PartitionSpec(batch)
    split = PartitionSpec(batch, None, heads)
    # One head of keys serves all queries, wherever these are.
    of_keys = split if k.shape[2] > 1 else rows
    arrays = (tokens, q, k, v, scale)
    specs = (jax.tree.map(lambda _: rows, tokens), split, of_keys, of_keys, whole)
    placed = jax.tree.map(
        lambda x, spec: jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec)), arrays, specs
    )
    named = {name for axis in (batch, heads) if axis for name in jax.tree.leaves(axis)}
    run = jax.shard_map(
        attend, mesh=sharding.mesh, in_specs=specs, out_specs=split, axis_names=named
    )
    return run(*placed)
