"""Attention for models, dense: the formula of the factored forward entry by entry, jax.nn's, and
how to compare.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import lora_limits as ll
from lora_limits.coordinates import frame as frames
from lora_limits.heads import polynomial_full
from lora_limits.polynomial import series
from tests.support.tools import quick_jit

B, S, N, K, H, V = 2, 9, 4, 2, 3, 2
ALL = np.ones((B, S), bool)
HOLES = np.array([[True] * S, [True, True, False, False, True, True, True, True, False]])
SCALE = 0.5


def taylor(degree, block=4, **options):
    return ll.Polynomial(degree, block_size=block, **options)


def inputs(
    seed=0,
    queries=S,
    keys=S,
    heads=N,
    key_heads=K,
    width=H,
    value_width=V,
    size=0.8,
    dtype=np.float64,
):
    """(query, key, value), and a cotangent of the output. Keys and queries have a common bias."""
    rng = np.random.default_rng(seed)
    shapes = (
        (B, queries, heads, width),
        (B, keys, key_heads, width),
        (B, keys, key_heads, value_width),
        (B, queries, heads, value_width),
    )
    q, k, v, t = (rng.normal(size=shape) for shape in shapes)
    return tuple(np.asarray(x, dtype) for x in (size * q + 0.3, size * k - 0.4, v + 2, t))


@functools.cache
def compiled(method, causal=False, function=ll.attention):
    """(output, gradients in query, key and value) of arrays, cotangent, mask and scale."""

    def run(q, k, v, t, mask=ALL, scale=SCALE):
        call = functools.partial(function, method=method, is_causal=causal, mask=mask, scale=scale)
        out, back = jax.vjp(call, q, k, v)
        return out, back(t)

    return quick_jit(run)


def peer(q, k, v, *, method, is_causal, mask, scale):
    """jax.nn's attention; its softmax is single precision."""
    del method
    mask = None if mask is None else mask[:, None, None]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, mask=mask, scale=scale)


def oracle(q, k, v, *, method, is_causal, mask, scale):
    """The factored forward, every entry of it, its centres held constant."""
    hold, block = jax.lax.stop_gradient, method.block_size
    group = q.shape[2] // k.shape[2]

    def head(q, k, v, exists):
        q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        nu, mu, log_w = 0 * q[0, 0], 0 * k[0], 0 * k[:, 0]
        c = series.taylor(method.degree, q.dtype)
        if not is_causal:
            rows = hold(q.reshape(-1, q.shape[-1]))
            if method.centred:
                nu = rows.mean(0)
                log_w = k @ nu
                shares = jax.nn.softmax(jnp.where(exists, hold(log_w), -jnp.inf))
                mu = shares @ hold(k)
            if method.series != "taylor":
                asked = jnp.ones_like(rows[:, 0], bool)
                f = frames.of_rows(rows, hold(k), hold(v), asked, exists, method.centred)
                x, y = f.to_x @ (rows - f.nu[None]).T, f.to_y @ (hold(k) - f.mu[None]).T
                weights = jnp.where(exists, jnp.exp(hold(log_w) - f.shift), 0)
                c = polynomial_full.coefficients(method, x, y, asked, weights)
        s = jnp.einsum("tgh,sh->gts", q - nu[None, None], k - mu[None])
        p = sum(c[n] * s**n for n in range(method.degree + 1))
        f = jnp.exp(log_w)[None, None] * p
        if is_causal:
            size = -(-block // group)
            i, j = np.ogrid[: s.shape[1], : s.shape[2]]
            f = jnp.where((i // size == j // size)[None], jnp.exp(s), p)
            f = jnp.where((j <= i)[None], f, 0)
        f = jnp.where(exists[None, None], f, 0)
        return jnp.einsum("gts,sv->tgv", f / f.sum(-1, keepdims=True), v)

    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    grouped = q.reshape(*q.shape[:2], k.shape[2], group, q.shape[3])
    out = jax.vmap(jax.vmap(head, (1, 1, 1, None), 1))(grouped, k, v, mask)
    return out.reshape(*q.shape[:3], v.shape[3])


def assert_near(got, want, tolerance):
    """Outputs and all three gradients, relative to the largest entry of each."""
    for name, x, y in zip(
        ("out", "query", "key", "value"), (got[0], *got[1]), (want[0], *want[1]), strict=True
    ):
        assert x.shape == y.shape, name
        error = float(
            np.abs(np.asarray(x, float) - np.asarray(y, float)).max() / (np.abs(y).max() or 1)
        )
        assert error <= tolerance, f"{name}: {error:.2e}"


def distance(got, want):
    pairs = zip((got[0], *got[1]), (want[0], *want[1]), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)
