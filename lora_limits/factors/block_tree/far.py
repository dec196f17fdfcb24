"""Sums over far keys, of all blocks at once and group by group, and the way back to the keys.

At the centre of a block a key weighs W_aj = exp(nu_a . y_j + log w_j - shift_a), 0 where it is near.
A query off the centre by delta sees it as W_aj e^(delta . y_j), which is taken to be

    W_aj (E_c + gamma_g delta . dy_j),   E_c = e^(delta . mu_c),   gamma_g = sum_{c in g} n_c E_c / n_g

(the second term sums to 0 over a node) for a key of node c in group g, with n_c, mu_c, v_c the sum
and means of W over the node, dy_j = y_j - mu_c and dv_j = v_j - v_c. Terms that are linear in dy and
dv need second moments of dy, dv and dz, z being what p is to be multiplied by; these are products of
all blocks with features of the keys, (a, keys) by (keys, d_value d): as dense as a computer likes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.factors.block_tree.layout import Layout
from lora_limits.linalg import PRECISION, dot


class Sums(NamedTuple):
    """Of far keys, for every block: by node, and by group the second moments within nodes."""

    n: Float[Array, "a nodes"]
    y: Float[Array, "a nodes d"]  # mu_c
    v: Float[Array, "a nodes dv"]  # v_c
    z: Float[Array, "a nodes m"]  # z_c
    yv: Float[Array, "a groups d_times_dv"]  # sum W dy dv^T
    vz: Float[Array, "a groups dv_times_m"]  # sum W dv dz^T
    yz: Float[Array, "a groups d_times_m"]  # sum W dy dz^T


class Returns(NamedTuple):
    """What blocks give their far keys: key j gets W_aj (node_c + vz_g^T dv_j).

    node: (dv + m) columns, those of dV, which vz adds nothing to, and those of p^T z.
    """

    node: Float[Array, "... nodes dv_and_m"]
    vz: Float[Array, "... groups dv_times_m"]


class _Group(NamedTuple):
    """One group's keys in its nodes, and which of its leaves are far; of all groups, stacked."""

    y: Float[Array, "... nodes keys d"]
    v: Float[Array, "... nodes keys dv"]
    z: Float[Array, "... nodes keys m"]
    log_w: Float[Array, "... nodes keys"]
    far: Bool[Array, "... a nodes leaves"]


def outer(a: Float[Array, "n p"], b: Float[Array, "n q"]) -> Float[Array, "n p_times_q"]:
    """Row by row, a (x) b."""
    return (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], -1)


def contract(a: Float[Array, "n p"], both: Float[Array, "n p_times_q"]) -> Float[Array, "n q"]:
    """Row by row, a^T B with B (p, q)."""
    return (a[:, :, None] * both.reshape(*a.shape, -1)).sum(1)


def _groups(layout: Layout, v: jax.Array, z: jax.Array) -> _Group:
    """All groups, stacked."""
    groups = layout.groups
    nodes = layout.nodes // groups
    keys = layout.key.size // layout.nodes

    def split(x):
        return x.reshape(groups, nodes, keys, *x.shape[2:])

    far = layout.far.reshape(layout.far.shape[0], groups, nodes, -1)
    y, v, z, log_w = (split(x) for x in (layout.y, v, z, layout.log_w))
    return _Group(y, v, z, log_w, far.transpose(1, 0, 2, 3))


def _weights(layout: Layout, group: _Group) -> Float[Array, "a nodes keys"]:
    """W of a group."""
    at_centre = jnp.einsum("ad,ckd->ack", layout.centre, group.y, precision=PRECISION)
    w = jnp.exp(at_centre + (group.log_w[None] - layout.shift[:, None, None]))
    return jnp.where(jnp.repeat(group.far, layout.key.shape[1], axis=2), w, 0)


def sums(
    layout: Layout, v: Float[Array, "leaves size dv"], z: Float[Array, "leaves size m"]
) -> Sums:
    """Sums over far keys of every block. O(L a (d dv + dv m + d m)) time.

    O(a (nodes (d + dv + m) + groups (d dv + dv m + d m))) memory, whatever L is.
    """
    d = layout.y.shape[-1]
    dv = v.shape[-1]

    def of_group(group: _Group):
        w = _weights(layout, group)
        columns = jnp.concatenate([jnp.ones_like(group.y[..., :1]), group.y, group.v, group.z], 2)
        total = jnp.einsum("ack,ckf->caf", w, columns, precision=PRECISION)
        n = total[..., 0]
        mean = total[..., 1:] / jnp.maximum(n, jnp.finfo(n.dtype).tiny)[..., None]
        flat = columns.reshape(-1, columns.shape[2])[:, 1:]
        y, v, z = jnp.split(flat, (d, d + dv), axis=1)
        features = jnp.concatenate([outer(y, v), outer(v, z), outer(y, z)], 1)
        second = dot(w.reshape(w.shape[0], -1), features)
        # about the means of nodes and not about 0
        y, v, z = jnp.split(mean, (d, d + dv), axis=2)
        pairs = (y, v), (v, z), (y, z)
        less = [
            jnp.einsum("cap,caq->apq", n[:, :, None] * p, q, precision=PRECISION) for p, q in pairs
        ]
        less = [x.reshape(w.shape[0], -1) for x in less]
        return n, mean, second - jnp.concatenate(less, 1)

    n, mean, second = jax.lax.map(of_group, _groups(layout, v, z))
    n = n.reshape(-1, n.shape[2]).T
    mean = mean.reshape(-1, *mean.shape[2:]).transpose(1, 0, 2)
    y, v, z = jnp.split(mean, (d, d + dv), axis=2)
    m = z.shape[2]
    second = second.transpose(1, 0, 2)
    return Sums(n, y, v, z, *jnp.split(second, (d * dv, d * dv + dv * m), axis=2))


def back_to_keys(
    layout: Layout, v: Float[Array, "leaves size dv"], sums: Sums, returns: Returns
) -> Float[Array, "leaves size dv_and_m"]:
    """What all blocks give each far key. O(L a dv (dv + m)) time."""
    dv = v.shape[-1]
    m = returns.node.shape[2] - dv
    groups = layout.groups

    def by_group(x):
        return x.reshape(x.shape[0], groups, -1, x.shape[2]).swapaxes(0, 1)

    def of_group(one):
        group, v_mean, node, vz = one
        w = _weights(layout, group)
        # dv is v less the mean of the node
        shift = jnp.einsum("acp,apq->acq", v_mean, vz.reshape(-1, dv, m), precision=PRECISION)
        node = jnp.concatenate([node[:, :, :dv], node[:, :, dv:] - shift], 2)
        out = jnp.einsum("ack,acf->ckf", w, node, precision=PRECISION)
        rest = contract(group.v.reshape(-1, dv), dot(w.reshape(w.shape[0], -1).T, vz))
        return out.at[:, :, dv:].add(rest.reshape(*out.shape[:2], m))

    none = jnp.zeros((*layout.log_w.shape, 0), v.dtype)
    moments = by_group(sums.v), by_group(returns.node), returns.vz.swapaxes(0, 1)
    out = jax.lax.map(of_group, (_groups(layout, v, none), *moments))
    return out.reshape(*layout.log_w.shape, dv + m)
