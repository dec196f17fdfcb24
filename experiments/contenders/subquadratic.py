"""Subquadratic attention of others, after its published definitions, differentiated by jax.grad.

HyperAttention (Han et al., arXiv 2310.05869), Thinformer (Carrell et al., arXiv 2502.12063), kNN
attention (Haris, arXiv 2411.04013). Which keys a query meets is drawn first and held constant, as
their code does; gradients flow through the scores and values of those keys. Signatures as in
baselines.py.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.contenders.baselines import Attention
from lora_limits.checks import fail
from lora_limits.linalg import dot

PLANES = 7  # hyperplanes of HyperAttention's hash, as published


def _softmax_of(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """sum_j e^{s_j} v_j / sum_j e^{s_j} over several sets of keys. parts: scores (..., n), of -inf
    where a key does not count, and values (..., n, dv), a set each.
    """
    top = jnp.stack([s.max(-1) for s, _ in parts]).max(0)[..., None]
    top = jax.lax.stop_gradient(top)
    weights = [jnp.exp(s - top) for s, _ in parts]
    outs = [
        jnp.einsum("...n,...nv->...v", w, v, precision="highest")
        for w, (_, v) in zip(weights, parts, strict=True)
    ]
    total = functools.reduce(jnp.add, (w.sum(-1) for w in weights))
    return functools.reduce(jnp.add, outs) / total[..., None]


# ---------------------------------------------------------------------------------- HyperAttention


def hyper(block: int, samples: int, key: jax.Array) -> Attention:
    """Queries and keys sorted by an angular hash, attention exact in blocks of equal place, and
    `samples` keys drawn uniformly for all queries, each standing for L / samples; those of the own
    block are left out. O(L (block + samples) (d + d_value)). block must divide both lengths.
    """

    def attend(q, k, v, beta):
        lq, lk = q.shape[0], k.shape[0]
        if lq % block or lk != lq:
            fail("tokens", (lq, lk), f"as many queries as keys, a multiple of {block}")
        planes, draw = jax.random.split(key)
        normals = jax.random.normal(planes, (q.shape[1], PLANES), q.dtype)
        by_query, by_key = (jnp.argsort(_gray(dot(x, normals))) for x in (q, k))
        places = by_query.reshape(-1, block), by_key.reshape(-1, block)
        own = beta * q[places[0]], k[places[1]], v[places[1]]
        inside = jnp.einsum("bid,bjd->bij", own[0], own[1], precision="highest")
        some = jax.random.randint(draw, (samples,), 0, lk)
        block_of = jnp.zeros(lk, jnp.int32).at[by_key].set(jnp.arange(lk, dtype=jnp.int32) // block)
        beside = jnp.einsum("bid,sd->bis", own[0], k[some], precision="highest")
        beside = beside + math.log(lk / samples)
        of_block = jnp.arange(lk // block, dtype=jnp.int32)[:, None]
        beside = jnp.where((block_of[some][None] == of_block)[:, None], -jnp.inf, beside)
        inner = own[2][:, None]
        out = _softmax_of([(inside, inner), (beside, v[some][None, None])])
        return jnp.zeros_like(out).reshape(lq, -1).at[by_query].set(out.reshape(lq, -1))

    return attend


def _gray(x: Float[Array, "n planes"]) -> Int[Array, " n"]:
    """The place of a row's signs in Gray's order, in which neighbours differ in one sign."""
    bits = (x > 0).astype(jnp.int32)
    place = jnp.zeros(x.shape[0], jnp.int32)
    running = jnp.zeros(x.shape[0], jnp.int32)
    for i in range(x.shape[1]):
        running = running ^ bits[:, i]
        place = 2 * place + running
    return place


# -------------------------------------------------------------------------------------- Thinformer


def thinformer(oversampling: int, key: jax.Array) -> Attention:
    """Attention to a coreset of 2^oversampling sqrt(L) keys, thinned by KH-Compress under
    exp(beta k . k') (v . v' + max |v|^2). O(4^oversampling L log L) for the coreset beside
    O(L 2^oversampling sqrt(L) d). L must be 4^oversampling times a power of 4.
    """

    def attend(q, k, v, beta):
        kept = _coreset(*jax.lax.stop_gradient((k, v, beta)), oversampling, key)
        f = jax.nn.softmax(beta * dot(q, k[kept].T), axis=-1)
        return dot(f, v[kept])

    return attend


def _coreset(k: jax.Array, v: jax.Array, beta: jax.Array, g: int, key: jax.Array) -> jax.Array:
    """Indices of the coreset: leaves of 4^g keys, four joined and halved at every level."""
    length = k.shape[0]
    levels = round(math.log(length / 4**g, 4)) if length >= 4**g else -1
    if levels < 0 or 4 ** (g + levels) != length:
        fail("tokens", length, f"{4**g} times a power of 4")
    top = (v**2).sum(1).max()

    def halved(index: jax.Array, key: jax.Array) -> jax.Array:
        x, y = k[index], v[index]
        kernel = jnp.exp(beta * dot(x, x.T)) * (dot(y, y.T) + top)
        return index[_halve(kernel, key)]

    index = jnp.arange(length, dtype=jnp.int32).reshape(-1, 4**g)
    for level in range(levels):
        joined = index.reshape(-1, 4 * index.shape[1])
        keys = jax.random.split(jax.random.fold_in(key, level), joined.shape[0])
        index = jax.vmap(halved)(joined, keys)
    return index[0]


def _halve(kernel: Float[Array, "m m"], key: jax.Array) -> Int[Array, " half_m"]:
    """Kernel halving: of every pair of neighbours one is kept, by a self-balancing walk."""
    m = kernel.shape[0]
    # psi(x) = sum over the pairs so far of +- (k(first, x) - k(second, x))
    first, second = kernel[0::2], kernel[1::2]
    change = first - second
    size = jnp.sqrt(jnp.maximum(change[:, 0::2].diagonal() - change[:, 1::2].diagonal(), 0))
    coins = jax.random.uniform(key, (m // 2,), kernel.dtype)

    def step(carry, at):
        psi, variance = carry
        i, length, coin = at
        alpha = psi[2 * i] - psi[2 * i + 1]
        # thresholds and their growth as published, at delta = 1/2
        spread = length * jnp.sqrt(variance * (2 * math.log(4 * m)))
        scale = jnp.maximum(jnp.maximum(spread, length**2), 1e-30)
        growth = 1 + (length**2 - 2 * scale) * variance / scale**2
        variance = variance + length**2 * jnp.maximum(growth, 0)
        swap = coin < jnp.clip(0.5 * (1 - alpha / scale), 0, 1)
        psi = psi + jnp.where(swap, 1.0, -1.0) * change[i]
        return (psi, variance), jnp.where(swap, 2 * i + 1, 2 * i)

    start = jnp.zeros(m, kernel.dtype), jnp.zeros((), kernel.dtype)
    pairs = jnp.arange(m // 2, dtype=jnp.int32)
    return jax.lax.scan(step, start, (pairs, size, coins))[1]


# ------------------------------------------------------------------------------------ kNN attention


def knn(near: int, samples: int, key: jax.Array) -> Attention:
    """The `near` keys of largest score of every query, exactly, and `samples` of the others drawn
    anew for each, standing for all of them: the estimator of softmax expectations on which the
    published gradients are built. The search is by brute force, O(L^2 d), which is part of its time.
    """

    def attend(q, k, v, beta):
        length = k.shape[0]

        @jax.checkpoint
        def rows(x, key):
            s = dot(beta * x, k.T)
            _, best = jax.lax.top_k(jax.lax.stop_gradient(s), near)
            taken = jnp.zeros(s.shape, bool).at[jnp.arange(x.shape[0])[:, None], best].set(True)
            some = jax.random.randint(key, (x.shape[0], samples), 0, length)
            free = ~jnp.take_along_axis(taken, some, 1)
            # each of those that fell outside stands for as many of the others as there are to one
            count = jnp.maximum(free.sum(1, keepdims=True, dtype=s.dtype), 1)
            far = jnp.take_along_axis(s, some, 1) + jnp.log((length - near) / count)
            far = jnp.where(free, far, -jnp.inf)
            close = jnp.take_along_axis(s, best, 1)
            return _softmax_of([(close, v[best]), (far, v[some])])

        block = min(512, q.shape[0])
        if q.shape[0] % block:
            fail("tokens", q.shape[0], f"a multiple of {block}")
        blocks = q.reshape(-1, block, q.shape[1])
        keys = jax.random.split(key, blocks.shape[0])
        return jax.lax.map(lambda at: rows(*at), (blocks, keys)).reshape(q.shape[0], -1)

    return attend
