"""Sequences of 2^16 to 2^20 tokens of which few are distinct: the reference counts them."""

from __future__ import annotations

import jax
import numpy as np

import lora_limits as ll
from experiments.attacks.tally import Tally, ratios
from experiments.problems import conditioned, extended
from lora_limits.instruments.compiling import quick_jit

KINDS = ("gaussian", "nearly equal tokens", "signs", "equal keys", "exact fit", "large biases")
BLOCKS = (64, 512, None)


def few_tokens(rng, shape, adapt, length, dtype):
    """(few distinct tokens as a problem, how often each query occurs, and each key)."""
    p = conditioned.make(
        int(rng.integers(2**31)),
        shape=shape,
        adapt=adapt,
        kind=KINDS[rng.integers(len(KINDS))],
        reach=10 ** rng.uniform(-3, 0.5),
        size=10 ** rng.uniform(-1, 1),
        dtype=dtype,
    )

    def times(n):
        share = rng.dirichlet(np.full(n, 10 ** rng.uniform(-1, 1)))
        count = np.maximum((share * length).astype(int), 1)
        count[np.argmax(count)] += length - count.sum()
        return count

    return p, times(shape.lq), times(shape.lk)


def repeated(p, nq, nk, order=None):
    """The long problem, its tokens in runs, or shuffled by `order`, a generator."""

    def rows(v, n):
        index = np.repeat(np.arange(len(n)), n)
        if order is not None:
            index = np.random.default_rng(order).permutation(index)
        return v[index]

    return ll.LoRAProblem(
        rows(p.x_query, nq),
        rows(p.x_key, nk),
        rows(p.x_value, nk),
        rows(p.target, nq),
        weights=p.weights,
        adapters=p.adapters,
        scale=p.scale,
        beta=p.beta,
    )


def long_sequences(count, seed=0, dtype=np.float64, longest=20):
    """`count` problems of one shape, one method and one length from 2^16 on, all drawn by the seed.

    Most are of 2^16 tokens; at most 2^longest.
    """
    rng = np.random.default_rng(seed)
    tally = Tally()
    length = 2 ** min(int(rng.choice([16, 16, 16, 17, 18, 20])), longest)
    shape = conditioned.Shape(
        lq=int(rng.integers(1, 5)),
        lk=int(rng.integers(1, 7)),
        inputs=(2, 2, 2),
        width=int(rng.integers(1, 3)),
        value_width=int(rng.integers(1, 3)),
        rank=1,
    )
    adapt = conditioned.SUBSETS[rng.integers(len(conditioned.SUBSETS))]
    method = ll.Polynomial(int(rng.integers(1, 8)), block_size=BLOCKS[rng.integers(len(BLOCKS))])
    run = quick_jit(ll.gradient, static_argnums=1)
    for i in range(count):
        p, nq, nk = few_tokens(rng, shape, adapt, length, dtype)
        many = repeated(p, nq, nk, None if rng.random() < 0.5 else i)
        result = jax.tree.map(lambda v: np.asarray(v)[None], run(many, method))
        want = extended.gradients(conditioned.stack([p]), nq[None], nk[None])
        worst, finite = ratios(result, want)
        tally.add(worst[0], finite[0], f"{method}, {nq}, {nk}, number {i}")
    jax.clear_caches()
    return {f"2^{length.bit_length() - 1} tokens": tally}
