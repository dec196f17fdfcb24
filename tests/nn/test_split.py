"""Attention inside a user's shard_map with its default checks, and on an explicit mesh.

The session has one device: four are run in a process of their own; all that tracing can tell is
told on a mesh without devices.
"""

import functools
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import lora_limits as ll
from tests.support import ROOT
from tests.support.split_attention import CAUSAL, METHODS
from tests.support.tools import later

COLLECTIVES = ("psum", "psum_invariant", "all_gather", "all_to_all", "ppermute", "pmax", "pmin")
DEFAULT = ("Exact", "Polynomial")


def on_four_devices(*names):
    """{(method, causal, kind of splitting): distance from one device}."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.split_attention", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    return {tuple(row[:3]): float(row[3]) for row in rows}


@pytest.mark.parametrize(
    "names", later(*((name,) for name in ("Exact,Polynomial", *METHODS) if name not in DEFAULT))
)
def test_split_over_devices_it_is_the_same(names):
    """Outputs summed into a data-parallel loss, and its gradients, forward and back."""
    names = names.split(",")
    found = on_four_devices(*names)
    assert len(found) >= 2 * len(names)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize(
    ("name", "causal"),
    [(n, False) for n in METHODS if n != "SparseLowRank"] + [(n, True) for n in CAUSAL],
)
def test_the_checks_of_shard_map_pass_and_nothing_crosses_devices(name, causal):
    """With the mask, the scale and the queries' heads each split in another way, or not at all."""
    mesh = AbstractMesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    options = {"method": METHODS[name], "is_causal": causal, "scale": 0.5}

    def local(q, k, v, mask):
        def loss(*arrays):
            return ll.attention(*arrays, mask=mask, **options).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    split = P("batch", None, "heads")
    specs = (split,) * 3
    run = jax.shard_map(local, mesh=mesh, in_specs=(*specs, P("batch")), out_specs=specs)
    x = jax.ShapeDtypeStruct((2, 24, 2, 3), np.float32)
    mask = jax.ShapeDtypeStruct((2, 24), bool)
    program = str(jax.make_jaxpr(run)(x, x, x, mask))
    assert not [word for word in COLLECTIVES if re.search(rf"\b{word}\[", program)]


def test_parameters_that_all_devices_share_get_the_sum_of_their_gradients():
    """A scale that does not vary over devices, inside shard_map: its gradient is summed there."""
    mesh = AbstractMesh((4,), ("batch",), axis_types=(AxisType.Auto,))

    def local(scale, q):
        call = functools.partial(ll.attention, method=ll.Polynomial(2, block_size=8))
        return jax.grad(lambda scale: call(q, q, q, scale=scale).sum())(scale)

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    x = jax.ShapeDtypeStruct((4, 24, 2, 3), np.float32)
    program = str(jax.make_jaxpr(run)(jax.ShapeDtypeStruct((), np.float32), x))
    assert [word for word in COLLECTIVES if re.search(rf"\b{word}\[", program)]
