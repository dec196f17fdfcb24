"""Attention on four devices, batch and heads split by a user's mesh: run by tests/nn/test_split.py.

Prints the largest distance from the same on one device, a line for each case; 0 is expected.
"""

import functools
import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_limits as ll

METHODS = {
    "Exact": ll.Exact(),
    "tiled": ll.Exact(8),
    "Polynomial": ll.Polynomial(3, block_size=8),
    "fitted": ll.Polynomial(2, "fitted", block_size=8),
    "Skeleton": ll.Skeleton(4),
    "SparseLowRank": ll.SparseLowRank(4, 4),
    "Nystrom": ll.Nystrom(4),
    "RandomFeatures": ll.RandomFeatures(8),
    "AdaptedMonomials": ll.AdaptedMonomials(10),
    "Svd": ll.Svd(6),
}
CAUSAL = ("Exact", "tiled", "Polynomial")
SPLIT = P("batch", None, "heads")
ONE = (SPLIT, P("batch"), P("batch"), SPLIT)  # one head of keys for all queries


def loss(arrays, method, **options):
    """A data-parallel loss: a sum over this device's sequences, or over all."""
    q, k, v, t = arrays
    return (ll.attention(q, k, v, method=method, **options) * t).sum()


def by_shard_map(mesh, solve, arrays):
    """jax.shard_map with its default checks, the loss summed over devices."""

    def local(*arrays):
        value, gradients = solve(arrays)
        return jax.lax.psum(value, ("batch", "heads")), gradients

    specs = (SPLIT,) * 4
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), specs)))(*arrays)


def by_explicit_mesh(mesh, solve, arrays, specs=(SPLIT,) * 4):
    """Shardings are part of the types."""
    explicit = jax.make_mesh(mesh.axis_sizes, mesh.axis_names, (AxisType.Explicit,) * 2)
    with jax.set_mesh(explicit):
        pairs = zip(arrays, specs, strict=True)
        placed = [jax.device_put(x, NamedSharding(explicit, spec)) for x, spec in pairs]
        return jax.jit(solve)(placed)


def distance(got, want):
    return max(
        float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-9))
        for x, y in zip(map(np.asarray, jax.tree.leaves(got)), jax.tree.leaves(want), strict=True)
    )


def main(names):
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), (AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    shapes = ((2, 24, 4, 3), (2, 24, 2, 3), (2, 24, 2, 3), (2, 24, 4, 3))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    one_key_head = [x[:, :, :1] if n in (1, 2) else x for n, x in enumerate(arrays)]
    for name in names:
        for causal in (False, True) if name in CAUSAL else (False,):
            part = functools.partial(loss, method=METHODS[name], is_causal=causal)
            solve = jax.value_and_grad(part)
            want = jax.jit(solve)(arrays)
            for split in (by_shard_map, by_explicit_mesh):
                found = distance(split(mesh, solve, arrays), want)
                print(name, causal, split.__name__, f"{found:.1e}", flush=True)
            if name == "Exact":
                want = jax.jit(solve)(one_key_head)
                found = distance(by_explicit_mesh(mesh, solve, one_key_head, ONE), want)
                print(name, causal, "one_key_head", f"{found:.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or METHODS)
