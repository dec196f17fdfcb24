"""Which degree is enough, at lengths where no L x L reference fits: errors of every degree from a few
sampled queries, averaged over the noise of the target in closed form.

The gradient of an adapter is a sum over queries of shares that are linear in the residual c_i:

    query   x_i (beta W_K^T C_i c_i)^T                    C_i = Cov_{f_i}(x, v), moments of f_i
    key     beta (C_i c_i) q_i^T + beta (C_i c_i) nu^T    q_i = Q_i - nu
    value   (sum_j f_ij xv_j) c_i^T

each then contracted with B or A (`shares`). For a polynomial, C_i is that of P' in the first place
and, beside nu, that of P, as in sweeps.py; and c~_i is the polynomial's own residual. Let the target
be Y_i = y_i + sigma xi_i, xi independent with mean 0 and variance 1. The error of the gradient is
then sum_i (h_i - N_i xi_i), where h_i is the difference of the two shares at xi = 0 and N_i the
linear map of xi_i, and

    E_xi || error ||_F^2 = || sum_i h_i ||_F^2  +  sigma^2 sum_i || N_i ||_F^2
                           "coherent"              "noise"

(the same of the gradient itself with the exact share alone). Noise grows like L, the coherent part
like L^2: below some length the one rules and beyond it the other, so neither may be left out. From m
queries drawn with replacement with probabilities pi_i, both come without bias:

    noise       mean over s of || N_s ||^2 / pi_s
    coherent    mean over s != t of <h_s / pi_s, h_t / pi_t>

the second as (|| sum_s h_s / pi_s ||^2 - sum_s || h_s / pi_s ||^2) / (m (m - 1)). Errors of degree g
weigh queries by |q_i|^g, and a few long tokens may hold all of them: pi is a mixture over powers of
|q_i| (drawn_queries.py). Standard errors
are the jackknife's: every draw is left out once, in closed form.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import lora_limits as ll
from experiments.contenders import sampled_moments
from experiments.contenders.drawn_queries import Draw, distinct, mixture
from experiments.contenders.sampled_moments import Row, times
from lora_limits.checks import check_integer
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import Frame
from lora_limits.estimate.intervals import draw
from lora_limits.instruments.compiling import quick_jit
from lora_limits.linalg import dot, widened
from lora_limits.problem import as_jax, project, scalars


class Queries(NamedTuple):
    """m drawn queries: input rows, centred projections, residuals' targets, and 1 / (m pi)."""

    x: Float[Array, "m dq"]
    q: Float[Array, "m d"]
    target: Float[Array, "m dv"]
    weights: Float[Array, " m"]


class Square(NamedTuple):
    """An estimate of E || sum_i share_i ||^2, and what it becomes without each draw."""

    value: Float[Array, ""]
    left_out: Float[Array, " m"]


def shares(
    problem: ll.LoRAProblem, frame: Frame, at: Queries, row: Row, c: Float[Array, "m dv"]
) -> dict[str, jax.Array]:
    """{"query.a": (m, r, d), ...}: the share of each query in each array, linear in c."""
    scale, beta = scalars(problem)
    out = {}
    for name, adapter in problem.adapters.items():
        if name == "query":
            # through the projection of the keys, whose centre C_i does not see
            to_key = project(problem, "key", jnp.eye(row.cov.shape[1], dtype=c.dtype))
            pairs = [(at.x, beta * dot(times(row.cov, c), to_key))]
        elif name == "key":
            nu = jnp.broadcast_to(frame.nu[None], at.q.shape)
            pairs = [(times(row.cov, c), beta * at.q), (times(row.plain, c), beta * nu)]
        else:
            pairs = [(row.xv + frame.xv_mean[None], c)]
        out[f"{name}.a"] = scale * _outer([(dot(x, adapter.b), y) for x, y in pairs])
        out[f"{name}.b"] = scale * _outer([(x, dot(y, adapter.a.T)) for x, y in pairs])
    return out


def _outer(pairs: list[tuple[jax.Array, jax.Array]]) -> Float[Array, "m p q"]:
    return sum(x[:, :, None] * y[:, None, :] for x, y in pairs)  # pyright: ignore


def _parts(problem: ll.LoRAProblem, frame: Frame, at: Queries, row: Row) -> dict[str, Any]:
    """{array: (share at xi = 0 (m, p, q), shares of each unit of xi (dv, m, p, q))}."""
    c = row.mean + frame.v_mean[None] - at.target
    units = jnp.broadcast_to(jnp.eye(c.shape[1], dtype=c.dtype)[:, None], (c.shape[1], *c.shape))
    still = shares(problem, frame, at, row, c)
    moved = jax.vmap(lambda unit: shares(problem, frame, at, row, unit))(units)
    return {name: (still[name], moved[name]) for name in still}


def _square(parts: Any, weights: jax.Array, noise: float, whole: bool) -> Square:
    """E || sum over all queries ||^2 of one array from the shares of those drawn."""
    still, moved = parts
    m = still.shape[0]
    sizes = noise**2 * (moved**2).sum((0, 2, 3))
    if whole:  # every query is there: nothing is estimated
        value = ((still * weights[:, None, None]).sum(0) ** 2).sum() + (sizes * weights).sum()
        return Square(value, jnp.broadcast_to(value, (m,)))
    # weights hold 1 / m; the pairs ask for 1 / (m (m - 1))
    x = (still * weights[:, None, None]).reshape(m, -1)
    own = (x**2).sum(1)
    every = x.sum(0)
    apart = (every**2).sum() - own.sum()
    without = ((every[None] - x) ** 2).sum(1) - (own.sum() - own)
    of_noise = sizes * weights
    # A sum of squares is not negative, though an estimate from pairs may be: that never makes an
    # error smaller than its noise.
    return Square(
        jnp.maximum(apart * (m / (m - 1)), 0) + of_noise.sum(),
        jnp.maximum(without * (m**2 / ((m - 1) * (m - 2))), 0)
        + (of_noise.sum() - of_noise) * (m / (m - 1)),
    )


def _relative(error: Square, true: Square) -> tuple[jax.Array, jax.Array]:
    """(relative error, its jackknife standard error)."""
    m = true.left_out.shape[0]
    tiny = jnp.finfo(true.value.dtype).tiny
    ratio = jnp.sqrt(error.value / jnp.maximum(true.value, tiny))
    left_out = jnp.sqrt(error.left_out / jnp.maximum(true.left_out, tiny))
    spread = ((left_out - left_out.mean()) ** 2).sum() * ((m - 1) / m)
    return ratio, jnp.sqrt(spread)


@functools.partial(jax.jit, static_argnames=("highest", "rows"))
def _look(problem: ll.LoRAProblem, drawn: Draw | None, key: jax.Array, *, highest: int, rows: int):
    """What is read of all tokens: the frame, the queries drawn, E and T_0 .. T_highest of them."""
    frame = frames.of_problem(problem)
    if drawn is None:
        pi = mixture(problem, frame)
        index = draw(key, pi, rows)
        drawn = Draw(index, 1 / (rows * pi[index]))
    x, target = (
        widened(jnp.asarray(z)[drawn.which], problem.dtype)
        for z in (problem.x_query, problem.target)
    )
    at = Queries(x, frame.centred_queries(problem, x), target, jnp.asarray(drawn.weights))
    return frame, at, sampled_moments.sums(problem, frame, at.q, highest)


def _errors(
    problem: ll.LoRAProblem, frame: Frame, at: Queries, moments, *, noise: float, whole: bool
):
    """{array: (relative errors, their standard errors)} and the least normaliser, by degree; and the
    root mean square of the centred scores.
    """
    exact, powers = moments
    truth = _parts(problem, frame, at, sampled_moments.row(exact, exact))
    sizes = {name: _square(parts, at.weights, noise, whole) for name, parts in truth.items()}
    plain, prime = sampled_moments.of_degrees(powers)

    def of_degree(moments):
        got = _parts(problem, frame, at, sampled_moments.row(*moments))
        gaps = jax.tree.map(jnp.subtract, got, truth)
        squares = {name: _square(x, at.weights, noise, whole) for name, x in gaps.items()}
        return {name: _relative(squares[name], sizes[name]) for name in squares}

    # sum_j w_j s_ij^2 / sum_j w_j, over all queries
    squares = 2 * powers.total[2] / powers.total[0]
    score = jnp.sqrt((at.weights * squares).sum() / at.weights.sum())
    return jax.lax.map(of_degree, (plain, prime)), plain.total.min(1) / frame.total, score


class Scan(NamedTuple):
    """Errors of every degree 0 .. highest. errors, spread: {array: (degrees,)}, the relative
    Frobenius error and its standard error; normaliser: the smallest row sum met at each degree, over
    that of degree 0: not positive, and the degree is not to be used. score: the root mean square of
    the centred scores, keys by their weights.
    """

    errors: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]
    normaliser: np.ndarray
    score: float

    def worst(self) -> tuple[np.ndarray, np.ndarray]:
        """(the largest error over the arrays at each degree, the standard error of that one)."""
        errors = np.stack(list(self.errors.values()))
        spread = np.stack(list(self.spread.values()))
        first = errors.argmax(0)
        at = np.arange(errors.shape[1])
        return errors[first, at], spread[first, at]


def scan(
    problem: ll.LoRAProblem,
    *,
    highest: int,
    rows: int = 256,
    noise: float = 1.0,
    key: jax.Array | None = None,
    alike: bool = False,
) -> Scan:
    """Relative errors of `gradient(problem, Polynomial(g))` for g = 0 .. highest, all in one pass.

    Expected over a target whose mean is problem.target and whose noise has standard deviation
    `noise`; noise = 0 is the problem as it is. rows: queries drawn, with `key`. Where there are no
    more tokens than that, or with `alike`, which is for tokens that repeat, every (kind of) query is
    looked at and the standard errors are 0. In double precision.
    O(rows L highest d_model d_value) time, nothing L x L.
    Raises ValueError for a highest below 2 or fewer than 3 rows.
    """
    check_integer("highest", highest, 2)
    check_integer("rows", rows, 3)
    problem = as_jax(problem)
    length = problem.x_query.shape[0]
    whole = None
    if alike:
        whole = distinct(problem)
    elif length <= rows:
        whole = Draw(np.arange(length, dtype=np.int32), np.ones(length))
    key = jax.random.key(0) if key is None else key
    looked = _look(problem, whole, key, highest=highest, rows=rows)
    errors, normaliser, score = _program()(
        problem, *looked, noise=float(noise), whole=whole is not None
    )
    return Scan(
        {name: np.asarray(value) for name, (value, _) in errors.items()},
        {name: np.asarray(spread) for name, (_, spread) in errors.items()},
        np.asarray(normaliser),
        float(score),
    )


@functools.cache
def _program():
    """`_errors` compiled quickly: it reads m rows, and no token."""
    return quick_jit(_errors, static_argnames=("noise", "whole"))
