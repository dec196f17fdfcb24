"""Sums over all keys for a few queries: the exact softmax row and every degree of Taylor's at once.

In the library's frame f_ij is in proportion to w_j exp(s_ij), and a Taylor polynomial of degree g
is the sum of the powers s_ij^n / n! up to n = g. So the moments

    T_n(i) = sum_j w_j s_ij^n / n! z_j      and      E(i) = sum_j w_j exp(s_ij) z_j

of the columns z_j = [1, x_j] (x) [1, v_j] and [xv_j] (centred inputs of keys, centred values,
centred inputs of values) are all that any degree, and the truth, will ever read of the keys. They
cost m L (1 + d_model)(1 + d_value) per degree for m queries: products of matrices, and nothing
L x L.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import lora_limits as ll
from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.linalg import PRECISION, dot
from lora_limits.problem import project

BLOCK = 2048  # keys at once


class Moments(NamedTuple):
    """Sums over the keys of weights times columns, for m queries, with any axes in front."""

    total: Float[Array, "*some m"]
    v: Float[Array, "*some m dv"]
    xk: Float[Array, "*some m dk"]
    cross: Float[Array, "*some m dk dv"]
    xv: Float[Array, "*some m dx"]


class Row(NamedTuple):
    """What the gradient reads of m rows of an attention matrix f~, exact or of some degree.

    cov: sum_j f'_ij x_j (v_j - mean_i)^T, with f' the row of the kernel, P' in place of P (for
    Taylor the row of one degree less, over the same D); plain: the same with f~ itself.
    """

    mean: Float[Array, "m dv"]  # sum_j f~_ij v_j
    cov: Float[Array, "m dk dv"]
    plain: Float[Array, "m dk dv"]
    xv: Float[Array, "m dx"]  # sum_j f~_ij xv_j


def sums(
    problem: ll.LoRAProblem, frame: Frame, q: Float[Array, "m d"], highest: int
) -> tuple[Moments, Moments]:
    """(E, T_0 .. T_highest) for centred queries q, the latter with the degree as their first axis.

    O(m L (d + highest d_model d_value)) time, O(highest m d_model d_value) memory. Valid for scores
    below 700, in double precision: beyond it exp overflows, and inf or NaN come out.
    """
    dv = frame.v_mean.shape[0]
    dk, dx = problem.x_key.shape[1], problem.x_value.shape[1]
    columns = (1 + dk) * (1 + dv) + dx
    orders = jnp.arange(1, highest + 2, dtype=q.dtype)

    def body(carry, first, fresh):
        exact, powers = carry
        xk = rows(problem.x_key, first, BLOCK, problem.dtype) - frame.xk_mean[None]
        xv = rows(problem.x_value, first, BLOCK, problem.dtype) - frame.xv_mean[None]
        k = frame.centred_keys(problem, xk + frame.xk_mean[None])
        w = jnp.where(fresh, jnp.exp(frame.log_weights(k)), 0)
        z = _columns(xk, project(problem, "value", xv), xv)
        s = frame.beta * dot(q, k.T)
        exact = exact + dot(w[None] * jnp.exp(s), z)

        def raise_power(t, step):
            order, held = step
            return t * s / order, held + dot(t, z)

        start = jnp.broadcast_to(w[None], s.shape)
        return exact, jax.lax.scan(raise_power, start, (orders, powers))[1]

    nothing = jnp.zeros((q.shape[0], columns), q.dtype)
    start = nothing, jnp.zeros((highest + 1, *nothing.shape), q.dtype)
    exact, powers = sweep(problem.x_key.shape[0], BLOCK, body, start)
    return _named(exact, dk, dv), _named(powers, dk, dv)


def _columns(
    xk: Float[Array, "n dk"], v: Float[Array, "n dv"], xv: Float[Array, "n dx"]
) -> Float[Array, "n columns"]:
    """z_j = [1, x_j] (x) [1, v_j], row by row, and xv_j behind it."""
    one = jnp.ones_like(xk[:, :1])
    left = jnp.concatenate([one, xk], 1)
    right = jnp.concatenate([one, v], 1)
    products = (left[:, :, None] * right[:, None, :]).reshape(xk.shape[0], -1)
    return jnp.concatenate([products, xv], 1)


def _named(x: Float[Array, "*some m columns"], dk: int, dv: int) -> Moments:
    """The sums of `_columns` by name."""
    split = (1 + dk) * (1 + dv)
    products = x[..., :split].reshape(*x.shape[:-1], 1 + dk, 1 + dv)
    return Moments(
        total=products[..., 0, 0],
        v=products[..., 0, 1:],
        xk=products[..., 1:, 0],
        cross=products[..., 1:, 1:],
        xv=x[..., split:],
    )


def of_degrees(powers: Moments) -> tuple[Moments, Moments]:
    """(P, P'): the moments of every Taylor polynomial, and of its derivative, which is 0 at degree 0
    and else the polynomial of one degree less.
    """
    plain = jax.tree.map(lambda x: jnp.cumsum(x, 0), powers)
    prime = jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]), plain)
    return plain, prime


def row(plain: Moments, prime: Moments) -> Row:
    """The rows of f~ from the moments of P and of P'; of f itself where both are E."""
    total = plain.total[:, None]
    mean = plain.v / total

    def centred(x: Moments) -> jax.Array:
        outer = x.xk[:, :, None] * mean[:, None, :]
        return (x.cross - outer) / total[:, :, None]

    return Row(mean, centred(prime), centred(plain), plain.xv / total)


def times(matrices: Float[Array, "m dk dv"], c: Float[Array, "m dv"]) -> Float[Array, "m dk"]:
    """One matrix times one vector for each query."""
    return jnp.einsum("mkv,mv->mk", matrices, c, precision=PRECISION)
