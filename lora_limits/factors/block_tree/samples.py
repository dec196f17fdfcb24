"""The remainder of far keys: an unbiased estimate from a few of them, drawn where it is large.

What nodes leave out of a row adds up over queries, while the gradient itself is a sum of terms of
either sign: without this, relative errors grow with the square root of L. Keys are drawn evenly
along the tree (systematically) with probability pi_j, so that

    sum over the draws of (e_ij - W_aj (E_ic + gamma_ig delta_i . dy_j)) / pi_j

has the mean that it should have, in the denominator and, times v_j, in the numerator. The queries
of a block share draws in sixteens: errors of those that share one add up.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates.frame import NOWHERE
from lora_limits.factors.block_tree.block import Scores
from lora_limits.factors.block_tree.far import Sums
from lora_limits.factors.block_tree.layout import Leaves
from lora_limits.linalg import PRECISION, dot

EVENLY = 0.05  # of the draws, over all far leaves
BY_SHARE = 0.05  # of the draws, in proportion to the share of f; the others by the remainder's size
LEAST = 0.1  # of the row sum of the nodes: a sum estimated below this is not believed


class Draws(NamedTuple):
    """How each run of queries draws keys: probabilities of leaves, their running sums, a start."""

    pi: Float[Array, "u leaves"]
    cumulative: Float[Array, "u leaves"]
    start: Float[Array, " u"]


def draws(
    share: Float[Array, "u leaves"],
    far_leaf: Bool[Array, " leaves"],
    leaves: Leaves,
    size: Float[Array, " leaves"],
    far: Sums,
    start: Float[Array, " u"],
) -> Draws:
    """Of one block: leaves in proportion to share |dy| (|v| + 0.3 mean |v|), mostly.

    size: the mean |v| of each leaf.
    """
    nodes = far.n.shape[0]
    in_nodes = leaves.mean.reshape(nodes, -1, leaves.mean.shape[1])
    across = jnp.einsum("cld,cd->cl", in_nodes, far.y, precision=PRECISION)
    square = (leaves.mean**2 + leaves.variance).sum(1).reshape(nodes, -1)
    square = square - 2 * across + (far.y**2).sum(1)[:, None]
    spread = jnp.sqrt(jnp.maximum(square, 0)).reshape(-1)
    exists = far_leaf & (leaves.log_n > NOWHERE)

    def normal(x):
        return x / jnp.maximum(x.sum(1, keepdims=True), jnp.finfo(x.dtype).tiny)

    share = jnp.where(exists[None], share, 0)
    remainder = share * (spread * (size + 0.3 * size.mean()))[None]
    pi = (1 - EVENLY - BY_SHARE) * normal(remainder) + BY_SHARE * normal(share)
    pi = pi + EVENLY * normal(exists[None].astype(share.dtype))
    return Draws(pi, jnp.cumsum(pi, 1), start)


def remainder(
    draw: Draws,
    count: int,
    keys: Float[Array, "leaves size columns"],
    s: Scores,
    delta: Float[Array, "b d"],
    centre: Float[Array, " d"],
    shift: Float[Array, ""],
    far: Sums,
) -> tuple[Float[Array, " b"], Float[Array, "b dv"]]:
    """What `count` keys a draw add to (D, D f V) of one block, in units of e^top.

    keys: y, log w and v of each side by side.
    """
    b, d = delta.shape
    leaves, size, _ = keys.shape
    number = draw.start.shape[0]
    grid = (jnp.arange(count, dtype=delta.dtype)[None] + draw.start[:, None]) / count
    grid = grid * draw.cumulative[:, -1:]
    leaf = jax.vmap(_search)(draw.cumulative, grid)
    leaf = jnp.minimum(leaf, leaves - 1)
    pi = jnp.take_along_axis(draw.pi, leaf, axis=1)
    end = jnp.take_along_axis(draw.cumulative, leaf, axis=1)
    # where in the interval of its leaf a point falls says which key of it
    within = 1 - (end - grid) / jnp.maximum(pi, jnp.finfo(pi.dtype).tiny)
    place = jnp.clip((within * size).astype(jnp.int32), 0, size - 1)
    drawn = keys.reshape(leaves * size, -1)[leaf * size + place]
    y, log_w, v = jnp.split(drawn, (d, d + 1), axis=2)
    at_centre = dot(y, centre)[:, :, None] + (log_w - shift)
    off = jnp.einsum("ukd,uqd->ukq", y, delta.reshape(number, -1, d), precision=PRECISION)
    e = jnp.exp(at_centre + off - s.top.reshape(number, 1, -1))
    # what is there already: of the node and of the linear term
    node = leaf // (leaves // far.n.shape[0])
    there = _there(s, delta, far, number)
    there = jax.vmap(lambda x, index: x[index])(there, node)
    exponential, gamma, along = jnp.split(there, 3, axis=2)
    w = jnp.exp(at_centre)
    error = e - w * (exponential + gamma * (off - along))
    # a leaf that is not drawn from says nothing
    weight = jnp.where(pi > 0, size / (count * pi), 0)[:, :, None]
    error = jnp.where(weight > 0, error * weight, 0)
    total = error.sum(1).reshape(b)
    return total, jnp.einsum("ukq,ukv->uqv", error, v, precision=PRECISION).reshape(b, -1)


def _search(cumulative: jax.Array, grid: jax.Array) -> jax.Array:
    """Which leaf each point of a grid lies in."""
    return jnp.searchsorted(cumulative, grid, side="right", method="scan")


def _there(s: Scores, delta: jax.Array, far: Sums, number: int) -> Float[Array, "draws nodes q3"]:
    """E_ic, gamma_ig and delta_i . mu_c of the queries of each draw, nodes first."""
    along = dot(far.y, delta.T)
    nodes = far.n.shape[0]
    gamma = jnp.repeat(s.gamma.T, nodes // s.gamma.shape[1], axis=0)
    each = jnp.exp(along - s.top[None]), gamma, along
    each = [x.reshape(nodes, number, -1).swapaxes(0, 1) for x in each]
    return jnp.concatenate(each, 2)
