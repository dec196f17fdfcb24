"""The only words that devices exchange: sums, maxima and minima over the mesh axes along which
tokens are split; and what jax.shard_map wants to be told of arrays that differ between devices.

axis: the mesh axis, or axes, that a shard_map has made manual; None on one device, where everything
is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Axis = str | tuple[str, ...] | None
T = TypeVar("T")


def devices(axis: Axis) -> int:
    """How many devices share the tokens."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def total(tree: T, axis: Axis) -> T:
    """Sums over devices of every array of a pytree, all of one dtype: one collective, of as many
    bytes as they have.
    """
    return tree if axis is None else _together(jax.lax.psum, tree, axis)


def largest(tree: T, axis: Axis) -> T:
    """Maxima over devices, entry by entry, in one collective."""
    return tree if axis is None else _together(jax.lax.pmax, tree, axis)


def gathered(x: jax.Array, axis: Axis) -> jax.Array:
    """Rows of all devices, in their order: as many bytes as there are rows."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def before(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of the arrays of the devices that come before this one."""
    return _of_others(x, axis, lambda others, own: others < own)


def after(x: jax.Array, axis: Axis) -> jax.Array:
    """The sum of the arrays of the devices that come after this one."""
    return _of_others(x, axis, lambda others, own: others > own)


def _of_others(x: jax.Array, axis: Axis, which: Callable[..., jax.Array]) -> jax.Array:
    """Summed over some devices; 0 on one device, which has no others."""
    if axis is None:
        return jnp.zeros_like(x)
    every = jax.lax.all_gather(x, axis)
    others = jnp.arange(every.shape[0], dtype=jnp.int32)
    wanted = which(others, jax.lax.axis_index(axis))
    # what is left out may be no number, and 0 times that is none
    return jnp.where(wanted.reshape(-1, *[1] * x.ndim), every, 0).sum(0, dtype=x.dtype)


def smallest(tree: T, axis: Axis) -> T:
    """Minima over devices, entry by entry, in one collective."""
    return tree if axis is None else _together(jax.lax.pmin, tree, axis)


def _together(collective: Callable[..., jax.Array], tree: Any, axis: Axis) -> Any:
    """The arrays end to end, for a collective costs its latency before its bytes."""
    leaves, structure = jax.tree.flatten(tree)
    flat = collective(jnp.concatenate([x.reshape(-1) for x in leaves]), axis)
    out = []
    first = 0
    for x in leaves:
        out.append(flat[first : first + x.size].reshape(x.shape))
        first += x.size
    return jax.tree.unflatten(structure, out)


def varying(tree: Any) -> frozenset[str]:
    """The mesh axes along which, to jax.shard_map's knowledge, some array of a pytree varies."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind: Any = jax.typeof(leaf)
        manual = getattr(kind, "manual_axis_type", None)
        axes |= kind.vma if manual is None else manual.varying
    return axes


def as_varying(tree: T, axes: frozenset[str]) -> T:
    """The same arrays, said to vary along `axes` too. Their gradients are summed over these."""

    def mark(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def varying_alike(tree: T) -> T:
    """The same arrays, each said to vary along every axis that any of them varies along."""
    return as_varying(tree, varying(tree))
