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
from jaxtyping import Array, Bool, Float, Int

from lora_limits.coordinates.frame import NOWHERE
from lora_limits.factors.block_tree.block import Scores
from lora_limits.factors.block_tree.far import Sums
from lora_limits.factors.block_tree.layout import Leaves
from lora_limits.linalg import PRECISION

EVENLY = 0.05  # of the draws, over all far leaves
BY_SHARE = 0.05  # of the draws, in proportion to the share of f; the others by the remainder's size
LEAST = 0.1  # of the row sum of the nodes: a sum estimated below this is not believed


class Draws(NamedTuple):
    """The keys that each run of queries draws; of all blocks, stacked."""

    key: Int[Array, "*blocks u count"]  # among those of all leaves, flat
    leaf: Int[Array, "*blocks u count"]
    weight: Float[Array, "*blocks u count"]  # 1 / (count pi)


def draws(
    share: Float[Array, "u leaves"],
    far_leaf: Bool[Array, " leaves"],
    leaves: Leaves,
    size: Float[Array, " leaves"],
    far: Sums,
    start: Float[Array, " u"],
    count: int,
    places: int,
) -> Draws:
    """Of one block: leaves in proportion to share |dy| (|v| + 0.3 mean |v|), mostly.

    size: the mean |v| of each leaf of so many places. start: where in the first of `count` equal
    parts the first key is drawn.
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
    return _evenly(pi, start, count, places)


def remainder(
    draw: Draws,
    keys: Float[Array, "leaves size columns"],
    s: Scores,
    x: Float[Array, "b d"],
    centre: Float[Array, " d"],
    shift: Float[Array, ""],
    far: Sums,
) -> tuple[Float[Array, " b"], Float[Array, "b dv"]]:
    """What the keys that are drawn add to (D, D f V) of one block, in units of e^top.

    keys: y, log w, 1 and v of each side by side. Products are taken with all of these columns, zeros
    beside those that are wanted: to cut them apart would copy every key that is drawn. All that is
    wanted of a draw and a query comes out of a product of its own, for the exponentials are only
    quick where their arguments lie side by side.
    """
    d = x.shape[1]
    columns = keys.shape[2]
    number = draw.key.shape[0]
    drawn = keys.reshape(-1, columns)[draw.key]
    # x_i . y_j + log w_j of the queries that share the draw, and of their centre
    at_query = _products(drawn, _with_weight(x.reshape(number, -1, d), columns))
    of_centre = _with_weight(centre[None], columns)[0]
    at_centre = jnp.einsum("ukc,c->uk", drawn, of_centre, precision=PRECISION)[:, :, None] - shift
    # what is there already: of the node and of the linear term
    node = draw.leaf // (keys.shape[0] // far.n.shape[0])
    along = _products(far.y[node], (x - centre[None]).reshape(number, -1, d))
    gamma = _of_groups(s.gamma, node // (far.n.shape[0] // s.gamma.shape[1]))
    top = s.top.reshape(number, 1, -1)
    linear = jnp.exp(at_centre) * gamma * (at_query - shift - at_centre - along)
    there = jnp.exp(at_centre + along - top) + linear
    error = jnp.exp(at_query - (top + shift)) - there
    weight = draw.weight[:, :, None]
    error = jnp.where(weight > 0, error * weight, 0)
    found = jnp.einsum("ukq,ukc->uqc", error, drawn, precision=PRECISION)
    found = found.reshape(x.shape[0], columns)
    return found[:, d + 1], found[:, d + 2 :]


def _products(a: Float[Array, "u k c"], b: Float[Array, "u q c"]) -> Float[Array, "u k q"]:
    """Inner products of what is drawn and of the queries that share it."""
    return jnp.einsum("ukc,uqc->ukq", a, b, precision=PRECISION)


def _with_weight(x: Float[Array, "*n d"], columns: int) -> Float[Array, "*n columns"]:
    """[x, 1, 0 ...], whose product with the columns of a key is x . y + log w."""
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, columns - x.shape[-1])])


def _of_groups(gamma: Float[Array, "b groups"], group: Int[Array, "u k"]) -> Float[Array, "u k q"]:
    """gamma of the queries of each draw, for the groups of its keys."""
    table = gamma.T.reshape(gamma.shape[1], group.shape[0], -1).swapaxes(0, 1)
    return jax.vmap(lambda rows, i: rows[i])(table, group)


def _evenly(
    pi: Float[Array, "u leaves"], start: Float[Array, " u"], count: int, size: int
) -> Draws:
    """`count` keys of leaves of `size`, evenly along the tree under the probabilities pi."""
    cumulative = jnp.cumsum(pi, 1)
    last = cumulative[:, -1:]
    grid = (jnp.arange(count, dtype=last.dtype)[None] + start[:, None]) / count
    grid = grid * last
    leaf = jax.vmap(_search)(cumulative, grid)
    leaf = jnp.minimum(leaf, pi.shape[1] - 1)
    pi = jnp.take_along_axis(pi, leaf, axis=1)
    end = jnp.take_along_axis(cumulative, leaf, axis=1)
    # where in the interval of its leaf a point falls says which key of it
    within = 1 - (end - grid) / jnp.maximum(pi, jnp.finfo(pi.dtype).tiny)
    place = jnp.clip((within * size).astype(jnp.int32), 0, size - 1)
    # a leaf that is not drawn from says nothing
    weight = jnp.where(pi > 0, last * size / (count * pi), 0)
    return Draws(leaf * size + place, leaf, weight)


def _search(cumulative: jax.Array, grid: jax.Array) -> jax.Array:
    """Which leaf each point of a grid lies in."""
    return jnp.searchsorted(cumulative, grid, side="right", method="scan")
