"""The share of one query row in the error of an approximate gradient, exactly.

The loss is a sum over queries, so G - G~ = sum_i E_i, and E_i is one or two outer products. For one
query

    f  ~ w e^s                    the exact row             p  = f  o (c . v - rho)
    f~ = w P(s) / D               the polynomial's row      p~ = f~ o (c~ . v - rho~)
    f' = w P'(s) / D              the same in the kernel    p' = f' o (c~ . v - rho~)

with c~ and rho~ of f~. With tokens centred as the frame says, E_i of dl/dW is

    query   x_i dq^T                           dq = beta sum_j (p - p')_j k_j
    key     beta (y' (Q_i - nu)^T + y nu^T)    y' = sum_j (p - p')_j x_j,  y = sum_j (p - p~)_j x_j
    value   dx c^T + x~ dc^T                   (dx, dc) = sum_j (f - f~)_j (x_j, v_j)
                                               x~ = sum_j f~_j x_j

and dA = s (left B)^T right, dB = s left^T (right A^T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.linalg import dot, widened
from lora_limits.polynomial import series
from lora_limits.problem import Adapter, LoRAProblem, project, scalars
from lora_limits.problem_checks import refuse_structure

# (scores (m, n), weights w (n,), first key) -> w e^s as the factor has it, and as its kernel has
# it: (m, n) each
Kernel = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Terms(NamedTuple):
    """Outer products: the share of sampled row i in an array is sum_t left[t, i] right[t, i]^T."""

    left: Float[Array, "terms m n1"]
    right: Float[Array, "terms m n2"]


def polynomial_kernel(c: Float[Array, " degree_and_1"]) -> Kernel:
    """P in the factor and P' in the kernel; c: coefficients in powers of the score."""
    prime = series.derivative(c)

    def kernel(s, w, first):
        del first
        return w[None] * series.evaluate(c, s), w[None] * series.evaluate(prime, s)

    return kernel


class _Keys(NamedTuple):
    """One block of keys: centred tokens, and what m sampled queries give them.

    Tokens of the block before get 0.
    """

    xk: Float[Array, "n dk"]
    xv: Float[Array, "n dx"]
    k: Float[Array, "n d"]
    v: Float[Array, "n dv"]
    log_e: Float[Array, "m n"]  # s + log w
    plain: Float[Array, "m n"]  # w P(s)
    prime: Float[Array, "m n"]  # w P'(s)


def _keys(
    problem: LoRAProblem, frame: Frame, kernel: Kernel, q: jax.Array, first, fresh, block: int
) -> _Keys:
    xk = rows(problem.x_key, first, block, problem.dtype)
    xv = rows(problem.x_value, first, block, problem.dtype) - frame.xv_mean[None]
    k = frame.centred_keys(problem, xk)
    v = project(problem, "value", xv)
    log_w = frame.log_weights(k)
    s = frame.beta * dot(q, k.T)
    plain, prime = (jnp.where(fresh[None], x, 0) for x in kernel(s, jnp.exp(log_w), first))
    log_e = jnp.where(fresh[None], s + log_w[None], jnp.finfo(s.dtype).min)
    return _Keys(xk - frame.xk_mean[None], xv, k, v, log_e, plain, prime)


def _normalise(problem: LoRAProblem, frame: Frame, kernel: Kernel, q: jax.Array, block: int):
    """First sweep: top = max_j s + log w, and two sums with [1, v], exact and approximate.

    (m,), [Z, sum_j w e^s v] / e^top and [D, sum_j w P v]: (m, 1 + d_value).
    """

    def body(carry, first, fresh):
        top, exact, approximate = carry
        t = _keys(problem, frame, kernel, q, first, fresh, block)
        v = jnp.concatenate([jnp.ones_like(t.v[:, :1]), t.v], 1)
        new = jnp.maximum(top, t.log_e.max(1))
        exact = exact * jnp.exp(top - new)[:, None] + dot(jnp.exp(t.log_e - new[:, None]), v)
        return new, exact, approximate + dot(t.plain, v)

    zero = jnp.zeros((q.shape[0], 1 + frame.v_mean.shape[0]), q.dtype)
    start = (jnp.full(q.shape[0], jnp.finfo(q.dtype).min, q.dtype), zero, zero)
    return sweep(problem.x_key.shape[0], block, body, start)


def _differences(
    problem: LoRAProblem, frame: Frame, kernel: Kernel, q, target, block: int
) -> tuple[jax.Array, dict]:
    """(c, sums over keys): exact minus approximate, entry by entry, both from the same scores."""
    top, *sums = _normalise(problem, frame, kernel, q, block)
    (z, mean), (d, mean_approximate) = ((x[:, :1], x[:, 1:] / x[:, :1]) for x in sums)
    # c - m(v), of which both residuals are made
    rest = frame.v_mean[None] - target
    c = mean + rest
    c_approximate = mean_approximate + rest
    rho = (c * mean).sum(1)
    rho_approximate = (c_approximate * mean_approximate).sum(1)
    dk = problem.x_key.shape[1]
    dx = problem.x_value.shape[1]
    widths = {"query": (q.shape[1],), "key": (dk, dk), "value": (c.shape[1], dx, dx)}

    def body(carry, first, fresh):
        t = _keys(problem, frame, kernel, q, first, fresh, block)
        f = jnp.exp(t.log_e - top[:, None]) / z
        plain = t.plain / d
        prime = t.prime / d
        p = f * (dot(c, t.v.T) - rho[:, None])
        centred = dot(c_approximate, t.v.T) - rho_approximate[:, None]
        p_plain = p - plain * centred
        p_prime = p - prime * centred
        new = {
            "query": (dot(p_prime, t.k),),
            "key": (dot(p_prime, t.xk), dot(p_plain, t.xk)),
            "value": (dot(f - plain, t.v), dot(f - plain, t.xv), dot(plain, t.xv)),
        }
        return jax.tree.map(jnp.add, carry, {n: new[n] for n in carry})

    start = {
        n: tuple(jnp.zeros((q.shape[0], w), q.dtype) for w in widths[n]) for n in problem.adapters
    }
    return c, sweep(problem.x_key.shape[0], block, body, start)


def row_errors(
    problem: LoRAProblem, frame: Frame, kernel: Kernel, index: Int[Array, " m"], block: int
) -> dict[str, Adapter]:
    """The shares E_i of the queries `index` in the error: {name: Adapter(a=Terms, b=Terms)}.

    kernel: the approximate row, a polynomial's or an explicit factor's. O(m Lk (d + d_model)) time,
    O(m (block + d_model)) memory.
    """
    refuse_structure(problem, "an estimate from rows")
    beta = scalars(problem)[1]
    out = {}
    xq = widened(jnp.take(jnp.asarray(problem.x_query), index, axis=0), problem.dtype)
    target = widened(jnp.take(jnp.asarray(problem.target), index, axis=0), problem.dtype)
    q = frame.centred_queries(problem, xq)
    c, sums = _differences(problem, frame, kernel, q, target, block)
    for name in problem.adapters:
        if name == "query":
            left = xq[None]
            right = beta * sums[name][0][None]
        elif name == "key":
            left = jnp.stack(sums[name])
            right = beta * jnp.stack([q, jnp.broadcast_to(frame.nu[None], q.shape)])
        else:
            dc, dx, x = sums[name]
            left = jnp.stack([dx, x + frame.xv_mean[None]])
            right = jnp.stack([c, dc])
        out[name] = of_adapter(problem, name, left, right)
    return out


def of_adapter(
    problem: LoRAProblem,
    name: str,
    left: Float[Array, "terms m d_in"],
    right: Float[Array, "terms m d"],
) -> Adapter:
    """Terms of dl/dW -> those of the adapter's arrays: dA = s (left B)^T right, dB = s left^T (right A^T)."""
    scale = scalars(problem)[0]
    adapter = problem.adapters[name]
    a = Terms(dot(left, adapter.b), scale * right)
    return Adapter(a, Terms(left, scale * dot(right, adapter.a.T)))
