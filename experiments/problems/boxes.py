"""Families of problems that fill the box of Theorem 3.1: max |Q| = max |K| = Gamma, whatever the rest
is.

Three are typical inputs, which differ in how far a usual token stays from the largest one; the last
is the gadget of Theorem 4.1, in which the bound of the scores is attained. The map of the phase
boundary and all that is measured on it are drawn from these. A family of one's own is a function
(rng, length, width) -> tokens, (length, width), in TOKENS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import lora_limits as ll
from lora_limits.checks import fail
from lora_limits.hardness import gadgets
from lora_limits.problem import NAMES

LONG = 8.0  # times as long as the others, one token in 64
GADGET = "gadget"

Tokens = Callable[[np.random.Generator, int, int], np.ndarray]


def uniform(rng: np.random.Generator, length: int, width: int) -> Float[np.ndarray, "l d"]:
    """Entries uniform on [-1, 1]: bounded, as `ll.random_problem` has them."""
    return rng.uniform(-1, 1, (length, width))


def gaussian(rng: np.random.Generator, length: int, width: int) -> Float[np.ndarray, "l d"]:
    """Gaussian entries: the largest of all grows with L beside the usual one."""
    return rng.normal(size=(length, width))


def outliers(rng: np.random.Generator, length: int, width: int) -> Float[np.ndarray, "l d"]:
    """Gaussian tokens, one in 64 of them LONG times as long: the usual one is far from the bound."""
    x = rng.normal(size=(length, width))
    x[rng.choice(length, size=-(-length // 64), replace=False)] *= LONG
    return x


TOKENS: dict[str, Tokens] = {"uniform": uniform, "gaussian": gaussian, "outliers": outliers}
FAMILIES = (*TOKENS, GADGET)


def noise(family: str) -> float:
    """The standard deviation of the target's noise: the gadget's target is 0, as its proof has it."""
    return 0.0 if family == GADGET else 1.0


def problem(
    family: str, seed: int, *, length: int, width: int, rank: int, gamma: float
) -> ll.LoRAProblem:
    """All three projections adapted, scores bounded by R = gamma^2, the target its mean, 0.

    Typical families: self-attention as `ll.random_problem` has it but for the tokens, beta =
    1/width. The gadget: `_gadget`. float64; jax_enable_x64 must be on.
    Raises ValueError for another family, and where the gadget does not fit.
    """
    known = (*TOKENS, GADGET)
    if family not in known:
        fail("family", repr(family), f"one of {', '.join(known)}")
    adapted = ll.random_problem(
        jax.random.key(seed), length=1, width=width, rank=rank, gamma=gamma, adapt=NAMES
    )
    rng = np.random.default_rng(seed)
    if family == GADGET:
        return _gadget(rng, adapted, length, gamma)
    x = TOKENS[family](rng, length, width)
    x = jnp.asarray(x / np.abs(x).max())
    target = jnp.zeros((length, width))
    return ll.LoRAProblem(
        x, x, x, target,
        weights=adapted.weights, adapters=adapted.adapters, scale=adapted.scale, beta=adapted.beta,
    )  # fmt: skip


def _gadget(
    rng: np.random.Generator, adapted: ll.LoRAProblem, length: int, gamma: float
) -> ll.LoRAProblem:
    """Hamming's gadget on random points of {0,1}^floor(d/2), all of its d columns used: half of the
    queries live, half of the keys real, the rest pads.

    The pads weigh as much as the real keys of a usual query do: where the decider, which raises
    them step by step, reads its answer. Scores reach gamma^2 wherever a query meets its own point,
    which most do once 2^(d/2) is below L. beta = 2/d is the gadget's own. It is the worst case for
    polynomials, which see nothing but the scores; with only 2^(d/2) different points f has no
    higher rank, and other factors, or merged tokens, may find it easy. Hardness for every algorithm
    asks for points in a dimension of many times log2 L.
    """
    width = adapted.weights.query.shape[1]
    if width < 2 or length < gadgets.LEAST_TOKENS or length & (length - 1):
        fail("gadget", f"width {width}, length {length}", "two columns and a power of two from 64")
    bits = width // 2
    a, b = rng.integers(0, 2, (2, length // 2, bits))
    gadget = gadgets.hamming_gadget(a, b, distance=0, gap=1)
    # the column that is left over at an odd width carries pads too
    gadget = dataclasses.replace(gadget, pad_width=width - bits)
    beta0 = gamma**2 / bits
    # sum_j exp(beta0 x_i . y_j) is n cosh(beta0)^bits on average over the points
    raised = math.log(length / 2) + bits * math.log(math.cosh(beta0)) - beta0 * gadget.level
    queries, keys, v = gadgets.token_rows(gadget, beta0, raised)
    # what makes the adapted projections the identity
    own = {n: adapted.adapters[n] for n in ("query", "key")}
    eye = jnp.eye(width)
    value = ll.Adapter(jnp.full((1, 1), 0.5), jnp.ones((1, 1)))
    return ll.LoRAProblem(
        jnp.asarray(queries),
        jnp.asarray(keys),
        jnp.asarray(v[:, None]),
        jnp.zeros((length, 1)),
        weights=ll.AttentionWeights(
            query=eye - own["query"].b @ own["query"].a,
            key=eye - own["key"].b @ own["key"].a,
            value=jnp.full((1, 1), 0.5),
        ),
        adapters={**own, "value": value},
        scale=1.0,
        beta=1 / bits,
    )
