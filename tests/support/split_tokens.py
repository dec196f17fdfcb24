"""Attention whose tokens lie on four devices: run by tests/nn/test_split_tokens.py.

Prints, a line for each case, how far outputs and gradients are from those of one device (0 is
expected), or the numbers that the compiled program of a gradient sends between devices.
"""

import functools
import os
import re
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
from lora_limits.instruments.compiling import QUICK, quick_jit
from tests.support.sharded_worker import collectives

SPLIT = P(None, "tokens")
# Blocks of 3 tokens of 2 query heads: they end where devices do.
METHODS = {
    "Exact": (ll.Exact(), False),
    "tiled": (ll.Exact(8), True),
    "Polynomial": (ll.Polynomial(3, block_size=6), False),
    "uncentred": (ll.Polynomial(2, centred=False, block_size=5), False),
    "fitted": (ll.Polynomial(2, "fitted", block_size=6), False),
    "chebyshev": (ll.Polynomial(4, "chebyshev", block_size=6), False),
    "causal": (ll.Polynomial(2, block_size=6), True),
    "odd": (ll.Polynomial(3, block_size=64), True),
}


def inputs(tokens):
    rng = np.random.default_rng(0)
    shapes = ((2, tokens, 4, 3), (2, tokens, 2, 3), (2, tokens, 2, 2), (2, tokens, 4, 2))
    arrays = tuple(rng.normal(size=shape) for shape in shapes)
    return arrays, rng.uniform(size=(2, tokens)) < 0.8, jnp.asarray(0.5)


def loss(arrays, mask, scale, **options):
    q, k, v, t = arrays
    return (ll.attention(q, k, v, mask=mask, scale=scale, **options) * t).sum()


def by_shard_map(options, *given):
    """With its default checks, the loss summed over devices; one scale for all of them."""
    mesh = jax.make_mesh((4,), ("tokens",), (AxisType.Auto,))

    def local(*given):
        part = functools.partial(loss, axis_name="tokens", **options)
        value, gradients = jax.value_and_grad(part, (0, 2))(*given)
        return jax.lax.psum(value, "tokens"), gradients

    specs = ((SPLIT,) * 4, SPLIT, P())
    out = (P(), (specs[0], P()))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)).lower(*given)


def by_explicit_mesh(options, *given):
    """The types say where tokens lie."""
    mesh = jax.make_mesh((4,), ("tokens",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        specs = ((SPLIT,) * 4, SPLIT, P())
        placed = jax.tree.map(
            lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs, given
        )
        run = jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 2)))
        return run.lower(*placed), placed


def distance(got, want):
    return max(
        float(np.abs(np.asarray(x) - y).max() / np.abs(y).max())
        for x, y in zip(jax.tree.leaves(got), map(np.asarray, jax.tree.leaves(want)), strict=True)
    )


def main(names):
    """Distances of the methods named; of a method named with a +, what crosses devices."""
    jax.config.update("jax_enable_x64", True)
    for name in names:
        method, causal = METHODS[name.strip("+")]
        options = {"method": method, "is_causal": causal}
        for tokens in (48, 192) if name.endswith("+") else ():
            program = by_shard_map(options, *inputs(tokens)).compile(QUICK)
            # Places of a long result are numbered in comments.
            text = re.sub(r"/\*.*?\*/", "", program.as_text())
            sent = sum(numbers for _, numbers in collectives(text))
            print("sent", name.strip("+"), tokens, sent, flush=True)
        given = inputs(512 if name == "odd" else 24)
        want = quick_jit(jax.value_and_grad(functools.partial(loss, **options), (0, 2)))(*given)
        got = by_shard_map(options, *given).compile(QUICK)(*given)
        print("shard_map", name.strip("+"), 0, distance(got, want), flush=True)
        lowered, placed = by_explicit_mesh(options, *given)
        got = lowered.compile(QUICK)(*placed)
        print("explicit", name.strip("+"), 0, distance(got, want), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or METHODS)
