"""Coordinates in which scores are small: centred, balanced, and read block by block so that no L x
d copy exists.

f is unchanged by K - 1 mu^T, and queries shifted by nu re-weight the keys: f_ij ~ w_j exp(x_i .
y_j) with
w_j = exp(beta nu . K_j), x_i = sqrt(beta) N^-T (Q_i - nu), y_j = sqrt(beta) N (K_j - mu). The
balancing N equalises
the second moments of x and y (a matrix geometric mean), which makes |x_i||y_j| a good bound of |x_i
. y_j|.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.coordinates import collectives
from lora_limits.coordinates.collectives import Axis
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem, project, scalars

SAMPLE = 256


class Frame(NamedTuple):
    """What the sweeps need to know before the first feature is built. Vectors are columns, (d,) or
    (d, d).
    """

    nu: jax.Array  # (d,) centre of the queries; 0 when not centred
    mu: jax.Array  # (d,) weighted centre of the keys
    v_mean: jax.Array  # (d_value,) weighted mean of the values
    xk_mean: jax.Array  # (d_model,) weighted mean of the key inputs
    xv_mean: jax.Array  # (d_model,) weighted mean of the value inputs
    q_shift: jax.Array  # (d_model,) what is subtracted from the query inputs; 0 when not centred
    k_shift: jax.Array  # (d_model,) the same for the key inputs
    shift: jax.Array  # () largest log-weight, subtracted before exp
    total: jax.Array  # () sum of the weights
    to_x: jax.Array  # (d, d) sqrt(beta) N^-T
    to_y: jax.Array  # (d, d) sqrt(beta) N


def sweep(length: int, block: int, body, start):
    """Folds body(carry, first, fresh) over blocks of `block` tokens; returns the last carry.

    The last block is moved back to end at the last token, so no input is padded or copied; `fresh`
    (block,) is 0 where a token was seen before. O(1) extra memory.
    """
    size = min(block, length)
    blocks = -(-length // size)

    def step(carry, i):
        first = jnp.minimum(i * size, length - size)
        fresh = first + jnp.arange(size, dtype=jnp.int32) >= i * size
        return body(carry, first, fresh), None

    return jax.lax.scan(step, start, jnp.arange(blocks, dtype=jnp.int32))[0]


def rows(x: jax.Array, first: jax.Array, block: int) -> jax.Array:
    """Tokens first .. first + block of x: (block, d_model)."""
    return jax.lax.dynamic_slice_in_dim(x, first, min(block, x.shape[0]))


def _key_statistics(problem: LoRAProblem, direction: jax.Array, block: int, axis: Axis):
    """Online over keys, of all devices: largest log-weight, sum of weights, weighted sums of x_key
    and x_value.
    """
    dtype = problem.dtype
    lk, dk = problem.x_key.shape
    start = (
        jnp.asarray(jnp.finfo(dtype).min, dtype),
        jnp.zeros((), dtype),
        jnp.zeros(dk, dtype),
        jnp.zeros(problem.x_value.shape[1], dtype),
    )

    def body(carry, first, fresh):
        top, total, sum_k, sum_v = carry
        xk = rows(problem.x_key, first, block)
        xv = rows(problem.x_value, first, block)
        log_w = jnp.where(fresh, dot(xk, direction), jnp.finfo(dtype).min)
        new = jnp.maximum(top, log_w.max())
        shrink = jnp.exp(top - new)
        w = jnp.exp(log_w - new)
        return (
            new,
            total * shrink + w.sum(),
            sum_k * shrink + dot(w, xk),
            sum_v * shrink + dot(w, xv),
        )

    top, *sums = sweep(lk, block, body, start)
    if axis is None:
        return top, *sums
    new = collectives.largest(top, axis)
    return new, *collectives.total([x * jnp.exp(top - new) for x in sums], axis)


def _sqrt_and_inverse(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = jnp.linalg.eigh(m)
    root = jnp.sqrt(jnp.maximum(values, jnp.finfo(m.dtype).tiny))
    return dot(vectors * root[None], vectors.T), dot(vectors / root[None], vectors.T)


def balance(sx: jax.Array, sy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N, N^-T), symmetric, with N sy N = N^-1 sx N^-1 = their common second moment: N^2 = sy^-1 #
    sx.

    Both moments get a ridge of 1e-3 of their trace, so the condition number of N stays below about
    30 and the change
    of coordinates costs no accuracy, whatever the rank of the inputs. sx, sy: (d, d) positive
    semi-definite.
    """
    d = sx.shape[0]
    eye = jnp.eye(d, dtype=sx.dtype)

    def normalised(m):
        trace = jnp.trace(m)
        usable = jnp.isfinite(trace) & (trace > jnp.finfo(m.dtype).tiny * 1e8)
        trace = jnp.where(usable, trace, 1)
        return jnp.where(usable, m, eye / d) / trace + 1e-3 / d * eye, trace

    (sx, tx), (sy, ty) = normalised(sx), normalised(sy)
    root, inverse = _sqrt_and_inverse(sy)
    middle, _ = _sqrt_and_inverse(dot(dot(root, sx), root))
    n, n_inverse = _sqrt_and_inverse(dot(dot(inverse, middle), inverse))
    scale = (tx / ty) ** 0.25
    return n * scale, n_inverse / scale


def _sample_index(length: int, most: int, axis: Axis):
    """Indices (n,) of the sample, counted from this device's first token; `length`: tokens to a
    device.
    """
    whole = length * collectives.devices(axis)
    index = np.unique(np.linspace(0, whole - 1, min(most, whole)).astype(np.int32))
    return index if axis is None else index - jax.lax.axis_index(axis) * length


def sample_rows(x: jax.Array, most: int = SAMPLE, axis: Axis = None) -> jax.Array:
    """At most `most` rows of the whole sequence, evenly spread and static: the same however tokens
    are split.

    Rows that other devices hold come out as some row of this one, for `own` to take out.
    """
    index = _sample_index(x.shape[0], most, axis)
    return x[index] if axis is None else x[jnp.clip(index, 0, x.shape[0] - 1)]


def own(sampled: jax.Array, length: int, axis: Axis) -> jax.Array:
    """`sampled` (n, ...), something per sampled token, with 0 for tokens held by other devices."""
    if axis is None:
        return sampled
    index = _sample_index(length, sampled.shape[0], axis)
    held = ((index >= 0) & (index < length)).reshape(-1, *[1] * (sampled.ndim - 1))
    return jnp.where(held, sampled, 0)


def sample_weights(problem: LoRAProblem, frame: Frame, axis: Axis = None) -> jax.Array:
    """Weights w_j of the sampled keys, 0 for those of other devices."""
    k = project(problem, "key", sample_rows(problem.x_key, axis=axis))
    return own(
        jnp.exp(scalars(problem)[1] * dot(k, frame.nu) - frame.shift), problem.x_key.shape[0], axis
    )


def make(problem: LoRAProblem, block: int, centred: bool, axis: Axis = None) -> Frame:
    """The frame of a problem: two cheap passes, O(L d_model) time, O(d_model d) memory.

    axis: mesh axes over which tokens are split, every device calling this with its own; O(d_model +
    d^2) crosses them.
    """
    beta = scalars(problem)[1]
    q_shift = problem.x_query.mean(0)
    if axis is not None:
        q_shift = collectives.total(q_shift, axis) / collectives.devices(axis)
    if not centred:
        q_shift = jnp.zeros_like(q_shift)
    nu = project(problem, "query", q_shift[None])[0]
    direction = beta * dot(problem.weights.key, nu)
    if "key" in problem.adapters:
        a = problem.adapters["key"].a
        b = problem.adapters["key"].b
        direction = direction + beta * scalars(problem)[0] * dot(b, dot(a, nu))
    shift, total, sum_k, sum_v = _key_statistics(problem, direction, block, axis)
    xk_mean = sum_k / total
    xv_mean = sum_v / total
    k_shift = xk_mean if centred else jnp.zeros_like(xk_mean)
    mu = project(problem, "key", k_shift[None])[0]
    v_mean = project(problem, "value", xv_mean[None])[0]
    d = nu.shape[0]
    eye = jnp.eye(d, dtype=nu.dtype)
    frame = Frame(nu, mu, v_mean, xk_mean, xv_mean, q_shift, k_shift, shift, total, eye, eye)
    x = project(problem, "query", sample_rows(problem.x_query, axis=axis)) - nu[None]
    x = own(x, problem.x_query.shape[0], axis)
    y = project(problem, "key", sample_rows(problem.x_key, axis=axis)) - mu[None]
    w = sample_weights(problem, frame, axis)
    n, n_inverse = balance(*collectives.total((dot(x.T, x), dot((y * w[:, None]).T, y)), axis))
    root = jnp.sqrt(beta)
    return frame._replace(to_x=root * n_inverse, to_y=root * n)
