"""One sequence on several devices: the same as on one, what crosses them, and what is refused."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import lora_limits as ll
from tests.support import ROOT
from tests.support.tools import later

TIMEOUT = 400


@functools.cache
def on_four_devices(*names):
    """{(what, method, tokens): number} that tests/support/split_tokens.py prints."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.split_tokens", *names]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(what, method, int(tokens)): float(x) for what, method, tokens, x in rows}


@pytest.mark.parametrize(
    "names",
    [
        ("Polynomial+", "causal+"),
        *later((("Exact+", "tiled", "uncentred", "fitted", "chebyshev", "odd"),)),
    ],
    ids=" ".join,
)
def test_tokens_on_four_devices_are_the_same_as_on_one(names):
    """Outputs summed into a loss, and gradients in all inputs and the scale, keys masked."""
    found = on_four_devices(*names)
    distances = {key: x for key, x in found.items() if key[0] != "sent"}
    assert len(distances) == 2 * len(names)
    assert max(distances.values()) < 1e-11, distances


@pytest.mark.parametrize(
    ("name", "sums"), [("Polynomial", 2 * 2 * 2 * 20 * 3), ("causal", 4 * 2 * 2 * 2 * 10 * 3)]
)
def test_what_crosses_devices_does_not_grow_with_the_tokens(name, sums):
    """Forward and back: k sums of [1, v] a head of keys and sequence each, and little else."""
    found = on_four_devices("Polynomial+", "causal+")
    sent = [found["sent", name, tokens] for tokens in (48, 192)]
    assert sent[0] == sent[1]
    assert sums <= sent[0] < 1.3 * sums


@pytest.mark.slow
def test_keys_that_are_gathered_grow_with_the_tokens():
    """What is counted above would see it."""
    found = on_four_devices("Exact+", "tiled", "uncentred", "fitted", "chebyshev", "odd")
    assert found["sent", "Exact", 192] > 3.9 * found["sent", "Exact", 48]


def split(method, tokens=24, keys=None, **options):
    """attention traced on a mesh of four, tokens split."""
    mesh = AbstractMesh((4,), ("tokens",), axis_types=(AxisType.Auto,))

    def local(q, k):
        return ll.attention(q, k, k, method=method, axis_name="tokens", **options)

    spec = P(None, "tokens")
    run = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    return jax.eval_shape(
        run, *(jax.ShapeDtypeStruct((1, n, 1, 3), np.float32) for n in (tokens, keys or tokens))
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ll.Skeleton(3), {}, r"method with tokens split over devices: got Skeleton\(.*Polynomial"),
        (ll.BlockTree(), {}, "method with tokens split over devices: got BlockTree"),
        (ll.Exact(), {"local_window_size": 3}, "local_window_size with tokens split.*: got"),
        (ll.Exact(), {"query_segment_ids": np.zeros(6, int)}, "query_segment_ids with tokens"),
        (ll.Exact(), {"query_seq_lengths": np.ones(1, int)}, "query_seq_lengths with axis_name"),
        (ll.Exact(), {"is_causal": True, "keys": 28}, "key with tokens split.*got 7 tokens"),
        (
            ll.Polynomial(3, block_size=2),
            {"is_causal": True},
            "degree with tokens split over devices: got 3, expected an even one, or 128 tokens",
        ),
    ],
    ids=lambda x: "" if isinstance(x, dict) else None,
)
def test_what_cannot_be_split_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        split(method, **options)


def test_a_factor_is_refused_where_types_split_tokens():
    mesh = AbstractMesh((4,), ("tokens",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, P(None, "tokens"))
        x = jax.ShapeDtypeStruct((1, 24, 2, 3), np.float32, sharding=sharding)
        with pytest.raises(ValueError, match="method with tokens split over devices: got Svd"):
            jax.eval_shape(lambda x: ll.attention(x, x, x, method=ll.Svd(2)), x)
