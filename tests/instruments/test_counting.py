"""What devices tell each other, read off a program."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from lora_limits.instruments.counting import exchanged_bytes


def test_bytes_between_devices_are_counted():
    """A sum and a maximum of what goes in, a gathering of what comes out, loops multiplied out; and
    nothing that no result depends on.
    """
    mesh = AbstractMesh((4,), ("tokens",), axis_types=(AxisType.Auto,))

    def local(x):
        jax.lax.psum(x, "tokens")
        top = jax.lax.pmax(x.max(), "tokens")
        every = jax.lax.all_gather(x, "tokens", tiled=True)

        def step(carry, _):
            return jax.lax.psum(carry + top, "tokens"), None

        summed = jax.lax.scan(step, jnp.zeros_like(top), length=5)[0]
        return x + every.sum() + summed

    run = jax.shard_map(local, mesh=mesh, in_specs=P("tokens"), out_specs=P("tokens"))
    x = jax.ShapeDtypeStruct((24,), np.float32)
    # one maximum, 24 numbers gathered, and five sums
    assert exchanged_bytes(run, x) == 4 * (1 + 24 + 5)
    assert exchanged_bytes(lambda x: x + 1, x) == 0
