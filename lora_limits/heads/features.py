"""What full and causal polynomial attention share: blocks of tokens, evaluation, normalisation.

Arrays lie tokens last: c numbers of n tokens are (c, n).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lora_limits.linalg import dot
from lora_limits.polynomial import evaluation


def split(x: Shaped[Array, "c n"], size: int) -> Shaped[Array, "blocks c size"]:
    """The tokens in blocks of `size`, zeros behind the last one."""
    blocks = -(-x.shape[1] // size)
    missing = blocks * size - x.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, missing)))
    return padded.reshape(x.shape[0], blocks, size).transpose(1, 0, 2)


def join(x: Float[Array, "blocks c size"], length: int) -> Float[Array, "c length"]:
    """The inverse of `split`: the first `length` tokens of all blocks."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)[:, :length]


def with_ones(v: Float[Array, "dv n"]) -> Float[Array, "dv+1 n"]:
    """[1, v]: the ones sum to the normaliser where v sums to the output."""
    return jnp.concatenate([jnp.ones_like(v[:1]), v])


def evaluate(m: Float[Array, "k c"], parts: list[Float[Array, "_ n"]]) -> Float[Array, "c n"]:
    """m^T phi: c polynomials with coefficients m, phi given by degree in `parts`."""
    # The top degree has most of the features: it is multiplied where it lies, never copied.
    top = parts[-1].shape[0]
    out = dot(m[-top:].T, parts[-1])
    if len(parts) == 1:
        return out
    return out + dot(m[:-top].T, jnp.concatenate(parts[:-1]))


def normalised(u: Float[Array, "c n"]) -> Float[Array, "c-1 n"]:
    """u[1:] / u[0], NaN where the normaliser u[0] is not positive, 0 where there was nothing to sum."""
    good = u[:1] > 0
    nothing = (u == 0).all(0, keepdims=True)
    safe = jnp.where(good, u[:1], 1)
    return jnp.where(good | nothing, u[1:] / safe, jnp.nan)


def cotangent(
    gout: Float[Array, "dv n"], out: Float[Array, "dv n"], normaliser: Float[Array, " n"]
) -> Float[Array, "dv+1 n"]:
    """g_i = [-<gout_i, out_i>, gout_i] / D_i, what flows back into [D_i, D_i out_i].

    A token that is not asked for gives 0; one that is, and has no normaliser, gives NaN.
    """
    # 0 times NaN is NaN, so outputs without a normaliser are taken out of the products.
    good = normaliser[None] > 0
    gout = jnp.where(good | (gout == 0), gout, jnp.nan)
    rho = (gout * jnp.where(good, out, 0)).sum(0, keepdims=True)
    return jnp.concatenate([-rho, gout]) / jnp.where(good, normaliser[None], 1)


def asked_for(
    gout: Float[Array, "dv n"],
    x: Float[Array, "d n"],
    out: Float[Array, "dv n"],
    normaliser: Float[Array, " n"],
) -> tuple[Float[Array, "d n"], Float[Array, "dv n"], Float[Array, " n"]]:
    """(x, out, normaliser) with something harmless in the tokens whose outputs are not asked for.

    Their features meet cotangents of 0, which must give 0 however large they are.
    """
    asked = (gout != 0).any(0)
    x, out = (jnp.where(asked[None], z, 0) for z in (x, out))
    return x, out, jnp.where(asked, normaliser, 1)


def slopes(
    lifted: evaluation.Lift,
    x: Float[Array, "d n"],
    parts: list[Float[Array, "_ n"]],
    z: Float[Array, "c n"],
) -> tuple[Float[Array, "c n"], Float[Array, "d n"]]:
    """(u, sum_c z_c grad u_c) at tokens x, `parts` their features of the degrees below the top."""
    values = evaluation.evaluate(lifted, x, parts)
    u = values.low + values.top
    return u, evaluation.slope(lifted, values, x, parts, z)


def lower(degree: int) -> int:
    """How many degrees of features `slopes` wants."""
    return max(degree, 1)
