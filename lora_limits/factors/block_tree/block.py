"""One block of like queries: what near keys and nodes make of f and of p.

With e_ij = exp(x_i . y_j + log w_j), all of it in units of e^top_i,

    D_i       ~ sum_near e_ij + sum_c n_c E_ic + R_i
    D_i f~V_i = sum_near e_ij v_j + sum_c n_c E_ic v_c + sum_g gamma_ig (sum W dy dv^T)_g^T delta_i + R'_i

R_i and R'_i are the remainders of samples.py, of mean true. The way back has none: in its kernel far
keys weigh kappa_i times as much, so that rows of f sum to 1 with the D_i of the forward. With
h_i = c_i / D_i, rho_i the mean of h_i . v under that kernel, and far keys times kappa_i,

    p_ij = e_ij (h_i . v_j - rho_i)                                                          near
    p_ij = W_aj ((E_ic (h_i . v_c - rho_i) + gamma_ig h_i . dv_j + epsilon_ig delta_i . dy_j)     far
    epsilon_ig = sum_{c in g} n_c E_ic (h_i . v_c - rho_i) / n_g

For p^T z the term in epsilon is left out: it changes nothing that could be measured. For p z, rho
has the linear terms of f~V in it; for p^T z it has not, for then the rows of p sum to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.factors.block_tree.far import Returns, Sums, contract, outer
from lora_limits.linalg import dot

KAPPA = 0.3, 3.0  # how far the weight of far keys may be corrected


class Keys(NamedTuple):
    """Near keys of a block. ones_v_z: [1, v, z], which all sums over keys are taken of at once."""

    y: Float[Array, "near d"]
    log_w: Float[Array, " near"]  # less the block's shift
    ones_v_z: Float[Array, "near columns"]


class Scores(NamedTuple):
    """Of the queries of a block, in units of e^top; and sums over keys of them times [1, v, z]."""

    top: Float[Array, " b"]  # the largest exponent, less the block's shift
    near: Float[Array, "b near"]  # e_ij
    node: Float[Array, "b nodes"]  # n_c E_ic
    gamma: Float[Array, "b groups"]
    of_near: Float[Array, "b columns"]
    of_node: Float[Array, "b columns"]
    linear: Float[Array, "b dv"]  # sum_g gamma_ig (sum W dy dv^T)_g^T delta_i


class Kernel(NamedTuple):
    """How the way back normalises: near keys by `near`, far ones by `node`, kappa times as much."""

    near: Float[Array, "b 1"]  # 1 / D_i
    node: Float[Array, "b 1"]
    sums: Float[Array, "b columns"]  # f [1, v, z]
    linear: Float[Array, "b dv"]  # what the linear terms add to f V


class Weights(NamedTuple):
    """p of a block as p^T z needs it; what p z takes off it is `less` times f."""

    near: Float[Array, "b near"]
    node: Float[Array, "b nodes"]
    h: Float[Array, "b dv"]  # of far keys
    epsilon: Float[Array, "b groups"]  # as p z needs it
    less: Float[Array, "b 1"]


def node_columns(far: Sums) -> Float[Array, "nodes columns"]:
    """[1, v, z] of the nodes."""
    return jnp.concatenate([jnp.ones_like(far.n)[:, None], far.v, far.z], 1)


def over_groups(x: Float[Array, "b nodes"], groups: int) -> Float[Array, "b groups"]:
    """Sums over the nodes of each group: a product, for sums over a short axis are slow."""
    each = x.shape[1] // groups
    return dot(x, jnp.repeat(jnp.eye(groups, dtype=x.dtype), each, axis=0))


def _per_group(x: Float[Array, "b nodes"], far: Sums) -> Float[Array, "b groups"]:
    """Sums over the nodes of each group over n_g."""
    groups = far.yv.shape[0]
    n = over_groups(far.n[None], groups)
    return over_groups(x, groups) / jnp.maximum(n, jnp.finfo(x.dtype).tiny)


def scores(x: Float[Array, "b d"], centre: Float[Array, " d"], keys: Keys, far: Sums) -> Scores:
    """Scores of a block on its near keys and its nodes."""
    delta = x - centre[None]
    near = dot(x, keys.y.T) + keys.log_w[None]
    log_n = jnp.log(jnp.maximum(far.n, jnp.finfo(x.dtype).tiny))
    node = dot(delta, far.y.T) + log_n[None]
    node = jnp.where(far.n > 0, node, jnp.finfo(x.dtype).min)
    top = jnp.maximum(near.max(1), node.max(1))
    near = jnp.exp(near - top[:, None])
    node = jnp.exp(node - top[:, None])
    gamma = _per_group(node, far)
    linear = contract(delta, dot(gamma, far.yv))
    of_near = dot(near, keys.ones_v_z)
    return Scores(top, near, node, gamma, of_near, dot(node, node_columns(far)), linear)


def forward(s: Scores) -> tuple[Float[Array, " b"], Float[Array, "b dv"]]:
    """(D, D f V) without remainders, in units of e^top."""
    sums = s.of_near + s.of_node
    return sums[:, 0], sums[:, 1 : 1 + s.linear.shape[1]] + s.linear


def kernel(s: Scores, total: Float[Array, " b"]) -> Kernel:
    """The kernel of the way back, from D_i with its remainder."""
    tiny = jnp.finfo(total.dtype).tiny
    near = s.of_near[:, :1]
    node = s.of_node[:, :1]
    kappa = jnp.clip((total[:, None] - near) / jnp.maximum(node, tiny), *KAPPA)
    by_near = 1 / jnp.maximum(near + kappa * node, tiny)
    by_node = kappa * by_near
    sums = s.of_near * by_near + s.of_node * by_node
    return Kernel(by_near, by_node, sums, s.linear * by_node)


def weights(s: Scores, f: Kernel, c: Float[Array, "b dv"], keys: Keys, far: Sums) -> Weights:
    """p of a block from c = dl/d(f V)."""
    dv = c.shape[1]
    rho = (c * f.sums[:, 1 : 1 + dv]).sum(1, keepdims=True)
    less = (c * f.linear).sum(1, keepdims=True)
    on_columns = jnp.concatenate([-rho, c], 1)
    near = s.near * dot(on_columns * f.near, keys.ones_v_z[:, : 1 + dv].T)
    node = s.node * dot(on_columns * f.node, node_columns(far)[:, : 1 + dv].T)
    epsilon = _per_group(node, far) - less * f.node * s.gamma
    return Weights(near, node, c * f.node, epsilon, less)


def times(
    s: Scores, f: Kernel, p: Weights, delta: Float[Array, "b d"], keys: Keys, far: Sums
) -> Float[Array, "b m"]:
    """p z."""
    z = keys.ones_v_z[:, 1 + p.h.shape[1] :]
    m = z.shape[1]
    out = dot(p.near, z) + dot(p.node, far.z) - p.less * f.sums[:, f.sums.shape[1] - m :]
    return out + contract(p.h, dot(s.gamma, far.vz)) + contract(delta, dot(p.epsilon, far.yz))


def transposed(
    s: Scores, f: Kernel, p: Weights, c: Float[Array, "b dv"], zq: Float[Array, "b m"], far: Sums
) -> tuple[Float[Array, "near dv_and_m"], Returns]:
    """(what the near keys get, what the far ones get): columns of f^T c, then of p^T zq."""
    # the few columns are turned round and not the many keys
    near = jnp.concatenate([dot((c * f.near).T, s.near), dot(zq.T, p.near)]).T
    node = jnp.concatenate([dot(p.h.T, s.node), dot(zq.T, p.node)]).T
    node = node / jnp.maximum(far.n, jnp.finfo(c.dtype).tiny)[:, None]
    return near, Returns(node, dot(s.gamma.T, outer(p.h, zq)))
