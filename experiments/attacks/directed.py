"""A family for each line of the certificate's derivation that was once wrong, or looked so."""

from __future__ import annotations

import jax
import numpy as np

import lora_limits as ll
from experiments.attacks.tally import Tally, ratios
from experiments.problems import conditioned, extended
from lora_limits.instruments.compiling import quick_jit


def build(x, target, w, ab, dtype, beta=1.0):
    """A problem from {name: inputs}, {name: weights} and {name: (a, b)} of its adapters."""

    def cast(v):
        return np.asarray(v, dtype)

    return ll.LoRAProblem(
        cast(x["query"]),
        cast(x["key"]),
        cast(x["value"]),
        cast(target),
        weights=ll.AttentionWeights(**{n: cast(v) for n, v in w.items()}),
        adapters={n: ll.Adapter(cast(a), cast(b)) for n, (a, b) in ab.items()},
        scale=1.0,
        beta=beta,
    )


def cancelling_normaliser(rng, dtype):
    """One key at a score of -8 to -19 and of no other interest, whose powers cancel in D_i."""
    reach, small = rng.uniform(8, 19), 10.0 ** rng.uniform(-7, 0)
    signs, near = np.tile([1, -1.0], 4), np.repeat(rng.uniform(-0.3, 0.3, 4), 2)
    other, value = (signs * np.repeat(rng.uniform(0.5, 1, 4), 2) for _ in range(2))
    x = {
        "query": np.full((4, 1), rng.uniform(0.97, 1)),
        "key": np.stack([np.append(-reach, near) / 16, np.append(0, other)], 1),
        "value": np.append(0, value)[:, None],
    }
    w = {"query": [[1.0]], "key": [[16.0], [0.0]], "value": [[small]]}
    ab = {
        "query": ([[1e-3]], [[1e-3]]),
        "key": ([[1.0]], [[0.0], [1e-3]]),
        "value": ([[small]], [[1e-3]]),
    }
    return build(x, -rng.uniform(0.5, 1, (4, 1)), w, ab, dtype)


def orthogonal_residuals(rng, dtype):
    """c ~ (1, 1.3) at right angles to v ~ (1.3, -1): c . v is what is left of two products."""
    n, stretch = int(rng.choice([2, 32])), 10.0 ** rng.uniform(0, 2)
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    side = rng.normal(size=(n, 1)) * np.array([[1.3, -1.0]])
    x = {
        "query": rng.normal(size=(n, 2)) * np.array([1, stretch]) @ turn,
        "key": rng.normal(size=(n, 2)) * np.array([1, 10.0 ** rng.uniform(-2, 0)]) @ turn,
        "value": side + 10.0 ** rng.uniform(-9, -2) * rng.normal(size=(n, 2)),
    }
    w = {"query": np.eye(2) * 0.1 / stretch, "key": np.eye(2), "value": np.eye(2)}
    ab = {m: (1e-3 * rng.normal(size=(1, 2)), 1e-3 * rng.normal(size=(2, 1))) for m in x}
    target = 10.0 ** rng.uniform(0, 3) * np.array([[1, 1.3]]) * rng.uniform(0.5, 1, (n, 1))
    return build(x, target, w, ab, dtype)


def wide_inputs(rng, dtype):
    """Keys of 300 inputs that cancel, and queries of which one direction is far longer."""
    n, width = int(rng.choice([2, 5])), 300
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    x = {
        "query": rng.normal(size=(n, 2)) * np.array([1e-3, 1]) @ turn,
        "key": rng.choice([1.0, 1 + 2.0**-20, 1 - 2.0**-21], size=(n, width)),
        "value": rng.normal(size=(n, 2)),
    }
    half = rng.normal(size=(width // 2, 2))
    w = {"query": np.eye(2), "key": np.concatenate([half, -half[::-1]]), "value": np.eye(2)}
    ab = {
        m: (1e-3 * rng.normal(size=(1, 2)), 1e-3 * rng.normal(size=(v.shape[1], 1)))
        for m, v in x.items()
    }
    return build(x, rng.normal(size=(n, 2)), w, ab, dtype, beta=10.0 ** rng.uniform(0, 4))


def directed(count, seed=0, dtype=np.float64):
    """`count` problems for each line of the derivation that was once wrong, or looked so."""
    rng = np.random.default_rng(seed)
    methods = {
        cancelling_normaliser: [ll.Polynomial(g, centred=False) for g in (60, 72)],
        orthogonal_residuals: [ll.Polynomial(g, block_size=b) for g, b in ((10, 1), (6, None))],
        wide_inputs: [ll.Polynomial(8), ll.Polynomial(5, centred=False)],
    }
    tallies = {}
    for make, several in methods.items():
        tally = tallies[make.__name__] = Tally()
        runs = [quick_jit(lambda p, method=m: ll.gradient(p, method)) for m in several]
        for i in range(count):
            p = make(rng, dtype)
            result = jax.tree.map(lambda v: np.asarray(v)[None], runs[i % len(runs)](p))
            worst, finite = ratios(result, extended.gradients(conditioned.stack([p])))
            tally.add(worst[0], finite[0], f"{several[i % len(runs)]}, number {i}")
        jax.clear_caches()
    return tallies
