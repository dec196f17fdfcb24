"""The polynomial gradient of one sequence split over the devices of a mesh, in one process or in
many.

Every device sweeps its own tokens. Keys are summarised where they lie and queries read the sums of
all of them, so what is exchanged are the sums over tokens of moments.py: O(k (1 + d_value + r) +
d_model r) numbers a device, however long the sequence is and however many devices hold it. No token
leaves its device, but for the 320 sampled ones, projected, to which series other than Taylor's are
fitted.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lora_limits.gradients import sweeps
from lora_limits.gradients.solve import GradientResult, Polynomial
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem, check_static

TOKENS = ("x_query", "x_key", "x_value", "target")


def sharded_gradient(
    problem: LoRAProblem, method: Polynomial, mesh: Mesh | AbstractMesh
) -> GradientResult:
    """`gradient` of a Polynomial method with tokens split over every axis of `mesh`, in its order
    of devices.

    The three input sequences and the target are split along their length, all else is replicated,
    and so is the result: gradient, loss, bound and normaliser are those of `gradient` up to
    rounding, and the bound counts that too. Inputs that already lie so on the mesh,
    PartitionSpec(mesh.axis_names), are not moved; across processes (jax.distributed), pass such
    global arrays, or NumPy arrays that are equal everywhere. jit with `method` and `mesh` static;
    compiled once for each pair otherwise. Per device of n: O(L k (d + 1) / n) time, O(k (1 +
    d_value + r + columns of the certificate) + d_model r) numbers sent, in 11 to 14 sums and maxima
    over the mesh: 12 for Taylor's series with a key or value adapter, of which XLA joins some.
    Raises ValueError for problems that do not fit together, for lengths that n does not divide, and
    for other methods.
    """
    check_static(problem)
    if not isinstance(method, Polynomial):
        raise ValueError(
            f"method: got {method!r}, expected a Polynomial, whose sums over tokens are all that is shared"
        )
    for name in ("x_query", "x_key"):
        length = getattr(problem, name).shape[0]
        if length % mesh.size:
            raise ValueError(
                f"{name}: got {length} tokens, expected a multiple of {mesh.size}, the devices of the mesh"
            )
    loss, grads, bound, normaliser = _run(problem, method, mesh)
    rank = monomials.count(problem.weights.query.shape[1], method.degree)
    return GradientResult(grads, loss, rank, bound, normaliser)


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _run(problem: LoRAProblem, method: Polynomial, mesh: Mesh | AbstractMesh):
    axes = tuple(mesh.axis_names)
    split = PartitionSpec(axes)
    whole = PartitionSpec()
    spec = jax.tree_util.tree_map_with_path(
        lambda path, _: split if path[0].name in TOKENS else whole, problem
    )
    if (
        AxisType.Explicit in mesh.axis_types
    ):  # where shardings are types, they are changed by name only
        problem = jax.sharding.reshard(
            problem, jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
        )

    def local(part: LoRAProblem):
        return sweeps.run(part, method, axis=axes)[:4]

    # the result is equal everywhere because its last step is a sum over the mesh; carries of scans
    # hide that from jax
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=whole, check_vma=False)(
        problem
    )
