"""Attention with everything that models put into it, dense and in float64, without a line from the
library: rotary positions, masks, a causal order, a window, packed documents.
"""

import jax
import jax.numpy as jnp
import numpy as np


def turned(x, angles):
    """Coordinates m and n + m as the real and imaginary part of a number times e^(i angle)."""
    n = angles.shape[1]
    z = jax.lax.complex(x[:, :n], x[:, n : 2 * n]) * jax.lax.complex(
        jnp.cos(angles), jnp.sin(angles)
    )
    return jnp.concatenate([z.real, z.imag, x[:, 2 * n :]], 1)


def who_sees_whom(problem):
    """(Lq, Lk) booleans, pair by pair."""
    lq, lk = len(problem.x_query), len(problem.x_key)
    out = np.ones((lq, lk), bool)
    for i in range(lq):
        for j in range(lk):
            if problem.causal and j > i:
                out[i, j] = False
            if problem.window is not None and i - j >= problem.window:
                out[i, j] = False
            if problem.key_mask is not None and not problem.key_mask[j]:
                out[i, j] = False
            if problem.segments is not None:
                low, high = min(i, j), max(i, j)
                if len(set(np.asarray(problem.segments)[low : high + 1].tolist())) > 1:
                    out[i, j] = False
    return out


def loss(problem, adapters):
    """1/2 sum over the queries that there are of |softmax(beta Q K^T, masked) V - Y|^2."""
    x = {"query": problem.x_query, "key": problem.x_key, "value": problem.x_value}
    rows = {}
    for name, tokens in x.items():
        w = jnp.asarray(getattr(problem.weights, name))
        if name in adapters:
            w = w + problem.scale * adapters[name].b @ adapters[name].a
        rows[name] = jnp.asarray(tokens) @ w
    if problem.rotations is not None:
        for name in ("query", "key"):
            rows[name] = turned(rows[name], jnp.asarray(getattr(problem.rotations, name)))
    seen = who_sees_whom(problem)
    s = problem.beta * rows["query"] @ rows["key"].T
    any_seen = seen.any(1)
    # a row that sees nothing is replaced before the softmax, and its output is 0
    s = jnp.where(seen | ~any_seen[:, None], s, -jnp.inf)
    out = jnp.where(any_seen[:, None], jax.nn.softmax(s, axis=1) @ rows["value"], 0)
    counts = np.ones(len(seen), bool) if problem.query_mask is None else problem.query_mask
    return 0.5 * (jnp.where(counts[:, None], out - problem.target, 0) ** 2).sum()


def loss_and_gradient(problem):
    """(loss, {name: Adapter}) by automatic differentiation."""
    adapters = jax.tree.map(jnp.asarray, dict(problem.adapters))
    return jax.value_and_grad(lambda adapters: loss(problem, adapters))(adapters)
