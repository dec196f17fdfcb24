"""The polynomial gradient of one sequence split over the devices of a mesh, in one process or many.

Every device sweeps its own tokens. Keys are summarised where they lie and queries read the sums of
all of them, so what is exchanged are the sums over tokens of sweeps.py: O(k (1 + d_value + r) +
d_model r) numbers a device, however long the sequence is and however many devices hold it. No token
leaves its device, but for the sampled ones, projected, to which series other than Taylor's are
fitted.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lora_limits.checks import fail
from lora_limits.gradients.methods import Polynomial
from lora_limits.method import GradientResult
from lora_limits.problem import LoRAProblem, check_static
from lora_limits.problem_checks import refuse_structure

TOKENS = ("x_query", "x_key", "x_value", "target")


def sharded_gradient(
    problem: LoRAProblem, method: Polynomial, mesh: Mesh | AbstractMesh
) -> GradientResult:
    """`gradient` of a Polynomial method, tokens split over every axis of `mesh` in device order.

    The three input sequences and the target are split along their length, all else is replicated,
    and so is the result: gradient, loss, bound and normaliser are those of `gradient` up to
    rounding, and the bound counts that too. Inputs that already lie so on the mesh,
    PartitionSpec(mesh.axis_names), are not moved; across processes (jax.distributed), pass such
    global arrays, or NumPy arrays that are equal everywhere.
    jit with `method` and `mesh` static; compiled once for each pair otherwise.
    Per device of n: O(L k (d + 1) / n) time, O(k (1 + d_value + r + columns of the certificate) +
    d_model r) numbers sent, in 12 to 16 sums and maxima over the mesh, of which XLA joins some; the
    bound of a gradient in single precision takes those of a second one, in double precision.
    Raises ValueError for problems that do not fit together, for lengths that n does not divide, and
    for other methods.
    """
    check_static(problem)
    refuse_structure(problem, "sharded_gradient")
    if not isinstance(method, Polynomial):
        expected = "a Polynomial, whose sums over tokens are all that is shared"
        fail("method", repr(method), expected)
    for name in ("x_query", "x_key"):
        length = getattr(problem, name).shape[0]
        if length % mesh.size:
            expected = f"a multiple of {mesh.size}, the devices of the mesh"
            fail(name, f"{length} tokens", expected)
    return _solve(problem, method, mesh)


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _solve(problem: LoRAProblem, method: Polynomial, mesh: Mesh | AbstractMesh) -> GradientResult:
    axes = tuple(mesh.axis_names)
    split = PartitionSpec(axes)
    whole = PartitionSpec()
    spec = jax.tree_util.tree_map_with_path(
        lambda path, _: split if path[0].name in TOKENS else whole, problem
    )
    # where shardings are types, they are changed by name only
    if AxisType.Explicit in mesh.axis_types:
        named = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
        problem = jax.sharding.reshard(problem, named)

    def local(part: LoRAProblem) -> GradientResult:
        return method.solve(part, axis=axes)

    # the result is equal everywhere because its last step is a sum over the mesh; carries of scans
    # hide that from jax
    run = jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=whole, check_vma=False)
    return run(problem)
