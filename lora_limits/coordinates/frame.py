"""The frame: coordinates in which scores are small, for every part of the library that needs them.

Three changes leave f = softmax(beta Q K^T) as it is or re-weight its keys:

    centre    the keys lose a common mu, the queries a common nu:  Q_i -> Q_i - nu,  K_j -> K_j - mu
    weigh     what nu did to the scores becomes a weight of the key:  w_j = exp(beta nu . K_j - shift)
    balance   x_i = sqrt(beta) N^-T (Q_i - nu),  y_j = sqrt(beta) N (K_j - mu)

so that f_ij is in proportion to w_j exp(x_i . y_j). N is the matrix geometric mean that gives x and
y the same second moments, which makes |x_i||y_j| a good bound of |x_i . y_j|. mu is the mean of the
keys under the weights w.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_limits.coordinates import collectives, key_statistics, sampling
from lora_limits.coordinates.balancing import balance
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.key_statistics import KeyStatistics
from lora_limits.coordinates.sampling import Sample
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.linalg import column_norms, dot, widened
from lora_limits.problem import LoRAProblem, project, project_columns, scalars
from lora_limits.problem_checks import refuse_structure

NOWHERE = -1e4  # the least log-weight, that of a key that does not exist; exp of it is 0
BLOCK = 512  # tokens to a block where nothing larger than the tokens is made of them


class Frame(NamedTuple):
    """Centres, weights and balance of one head. Rows in, rows out; a row is a token."""

    beta: Float[Array, ""]
    nu: Float[Array, " d"]  # centre of the queries; 0 when not centred
    mu: Float[Array, " d"]  # centre of the keys, weighted; 0 when not centred
    v_mean: Float[Array, " dv"]  # weighted mean of the values
    xk_mean: Float[Array, " dk"]  # weighted mean of the key inputs
    xv_mean: Float[Array, " dx"]  # weighted mean of the value inputs
    q_shift: Float[Array, " dq"]  # what the query inputs lose so that the queries lose nu
    k_shift: Float[Array, " dk"]  # what the key inputs lose so that the keys lose mu
    shift: Float[Array, ""]  # the largest log-weight, taken out of all of them
    total: Float[Array, ""]  # sum of the weights
    to_x: Float[Array, "d d"]  # sqrt(beta) N^-T
    to_y: Float[Array, "d d"]  # sqrt(beta) N

    def centred_queries(self, problem: LoRAProblem, xq: jax.Array) -> jax.Array:
        """Q_i - nu of input rows xq (n, dq).

        Inputs are centred before they are projected: a large common bias then costs no digits.
        """
        return project(problem, "query", xq - self.q_shift[None])

    def centred_keys(self, problem: LoRAProblem, xk: jax.Array) -> jax.Array:
        """K_j - mu of input rows xk (n, dk)."""
        return project(problem, "key", xk - self.k_shift[None])

    def log_weights(self, k: Float[Array, "n d"]) -> Float[Array, " n"]:
        """log w_j of centred keys."""
        return self.beta * dot(k, self.nu) - (self.shift - self.beta * dot(self.mu, self.nu))

    def weights(self, k: Float[Array, "n d"], exists: Bool[Array, " n"]) -> Float[Array, " n"]:
        """w_j of centred keys, 0 for those that do not exist."""
        log_w = jnp.where(exists, self.log_weights(k), 0)
        return jnp.where(exists, jnp.exp(log_w), 0)

    def x(self, q: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Balanced coordinates of centred queries."""
        return dot(q, self.to_x.T)

    def y(self, k: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Balanced coordinates of centred keys."""
        return dot(k, self.to_y.T)

    def product(
        self,
        q: Float[Array, "m d"],
        k: Float[Array, "n d"],
        exists: Bool[Array, " n"] | None = None,
        asked: Bool[Array, " m"] | None = None,
    ) -> tuple[Float[Array, "m d_and_1"], Float[Array, "n d_and_1"]]:
        """(x, y) with f = softmax(x y^T): the last column of x is 1 and that of y is log w_j <= 0.

        q, k: centred. exists, asked: which keys and which queries there are, all of them if None; a
        query that is not there is a row of zeros, its last column included.
        """
        x, y = self.x(q), self.y(k)
        one = jnp.ones_like(x[:, :1])
        if asked is not None:
            x = jnp.where(asked[:, None], x, 0)
            one = asked[:, None].astype(x.dtype)
        log_w = jnp.maximum(self.log_weights(k), NOWHERE)
        if exists is not None:
            y = jnp.where(exists[:, None], y, 0)
            log_w = jnp.where(exists, log_w, NOWHERE)
        return (
            jnp.concatenate([x, one], 1),
            jnp.concatenate([y, log_w[:, None]], 1),
        )


def row_range(
    x: Float[Array, "d n"], reach: Float[Array, ""], box: Float[Array, " d"]
) -> Float[Array, "1 n"]:
    """R_i >= max_j |x_i . y_j| of every column x_i.

    The smaller of two bounds: Cauchy-Schwarz with reach = max_j |y_j|, and one coordinate at a time
    with box = max_j |y_j| by coordinate.
    """
    return jnp.minimum(column_norms(x) * reach, dot(box[None], jnp.abs(x)))


def _mean(x: Float[Array, "tokens width"], block: int, dtype: Any) -> Float[Array, " width"]:
    """The mean of all rows; block by block where they are to be widened, for want of a wide copy."""
    if x.dtype == dtype:
        return x.mean(0)

    def body(total, first, fresh):
        return total + jnp.where(fresh[:, None], rows(x, first, block, dtype), 0).sum(0)

    return sweep(x.shape[0], block, body, jnp.zeros(x.shape[1], dtype)) / x.shape[0]


def _centres(problem: LoRAProblem, block: int, centred: bool, axis: Axis) -> Frame:
    """The frame before it is balanced."""
    refuse_structure(problem, "a frame of input rows")
    q_shift = _mean(problem.x_query, block, problem.dtype)
    if axis is not None:
        q_shift = collectives.total(q_shift, axis) / collectives.devices(axis)
    if not centred:
        q_shift = jnp.zeros_like(q_shift)
    keys = key_statistics.of_problem(problem, q_shift, block, axis)
    return centre(problem, q_shift, keys, centred)


def centre(
    problem: LoRAProblem, q_shift: Float[Array, " dq"], keys: KeyStatistics, centred: bool
) -> Frame:
    """The frame that q_shift and the statistics of all keys make, before it is balanced: to_x and
    to_y are the identity. No token of the problem is read.
    """
    nu = project(problem, "query", q_shift[None])[0]
    xk_mean = keys.xk / keys.total
    xv_mean = keys.xv / keys.total
    k_shift = xk_mean if centred else jnp.zeros_like(xk_mean)
    eye = jnp.eye(nu.shape[0], dtype=nu.dtype)
    return Frame(
        beta=scalars(problem)[1],
        nu=nu,
        mu=project(problem, "key", k_shift[None])[0],
        v_mean=project(problem, "value", xv_mean[None])[0],
        xk_mean=xk_mean,
        xv_mean=xv_mean,
        q_shift=q_shift,
        k_shift=k_shift,
        shift=keys.top,
        total=keys.total,
        to_x=eye,
        to_y=eye,
    )


def _draw(problem: LoRAProblem, frame: Frame, axis: Axis) -> Sample:
    """The sample of a problem, centred by the frame; x and y are not balanced yet."""
    lq, lk = problem.x_query.shape[0], problem.x_key.shape[0]
    tokens = problem.x_query, problem.target, problem.x_key, problem.x_value
    xq, target, xk, xv = (
        widened(sampling.sample_rows(z, axis=axis), problem.dtype) for z in tokens
    )
    q = sampling.own(frame.centred_queries(problem, xq), lq, axis).T
    residual = sampling.own(frame.v_mean[None] - target, lq, axis)
    k = sampling.own(frame.centred_keys(problem, xk), lk, axis)
    w = sampling.own(jnp.exp(frame.log_weights(k)), lk, axis)
    xk = sampling.own(xk - frame.xk_mean[None], lk, axis)
    xv = sampling.own(xv - frame.xv_mean[None], lk, axis)
    v = project_columns(problem, "value", xv)
    return Sample(q, q, residual, k.T, k.T, w, xk, xv, v)


def with_sample(
    problem: LoRAProblem, block: int, centred: bool, axis: Axis = None
) -> tuple[Frame, Sample]:
    """The frame of a problem and the sample that balanced it.

    Two cheap passes, O(L d_model) time, O(d_model d) memory. axis: mesh axes over which tokens are
    split, every device calling this with its own; O(d_model + d^2) numbers cross them.
    """
    return balanced(problem, _centres(problem, block, centred, axis), axis)


def balanced(problem: LoRAProblem, frame: Frame, axis: Axis = None) -> tuple[Frame, Sample]:
    """(The frame balanced by a sample of the tokens of the problem, the sample)."""
    sample = _draw(problem, frame, axis)
    second = dot(sample.q, sample.q.T), dot(sample.k * sample.w[None], sample.k.T)
    n, n_inverse = balance(*collectives.total(second, axis))
    root = jnp.sqrt(frame.beta)
    frame = frame._replace(to_x=root * n_inverse, to_y=root * n)
    return frame, sample._replace(x=dot(frame.to_x, sample.q), y=dot(frame.to_y, sample.k))


def of_problem(problem: LoRAProblem, block: int = BLOCK, centred: bool = True) -> Frame:
    """The frame of a problem, as `with_sample` makes it."""
    return with_sample(problem, block, centred)[0]


def of_rows(
    q: Float[Array, "m d"],
    k: Float[Array, "n d"],
    v: Float[Array, "n dv"],
    asked: Bool[Array, " m"],
    exists: Bool[Array, " n"],
    centred: bool = True,
    axis: Axis = None,
) -> Frame:
    """The frame of rows whose scores are q k^T (beta = 1).

    Of the queries that `asked` and the keys that `exists` says there are; others are finite. Rows
    are their own inputs. O(L d^2) time. axis: mesh axes over which rows are split; O(d^2) numbers
    cross them.
    """
    queries = asked.astype(q.dtype)
    summed, count = collectives.total((dot(queries, q), queries.sum()), axis)
    nu = summed / jnp.maximum(count, 1) if centred else jnp.zeros_like(q[0])
    log_w = dot(k, nu)
    shift = jnp.max(log_w, where=exists, initial=float(jnp.finfo(q.dtype).min))
    shift = collectives.largest(shift, axis)
    w = jnp.where(exists, jnp.exp(jnp.where(exists, log_w - shift, 0)), 0)
    weight, of_k, of_v = collectives.total((w.sum(), dot(w, k), dot(w, v)), axis)
    # the largest weight is 1, unless there is no key
    k_mean = of_k / jnp.maximum(weight, 1)
    v_mean = of_v / jnp.maximum(weight, 1)
    mu = k_mean if centred else jnp.zeros_like(k[0])
    x = jnp.where(asked[:, None], q - nu[None], 0)
    y = k - mu[None]
    second = dot(x.T, x), dot((y * w[:, None]).T, y)
    n, n_inverse = balance(*collectives.total(second, axis))
    one = jnp.ones((), q.dtype)
    return Frame(one, nu, mu, v_mean, k_mean, v_mean, nu, mu, shift, weight, n_inverse, n)
