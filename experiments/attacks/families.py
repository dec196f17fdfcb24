"""Problems of every kind and size: tokens that repeat, cancel or nearly agree, scales of 1e+-15,
targets near the output and far from it; every series, degree 0 to 8, centred and not.
"""

from __future__ import annotations

import jax
import numpy as np

import lora_limits as ll
from experiments.attacks.tally import Tally, ratios
from experiments.problems import conditioned, extended
from lora_limits.instruments.compiling import quick_jit

SERIES = ("taylor", "taylor", "chebyshev", "fitted")
SHAPES = (
    *conditioned.SHAPES.values(),
    conditioned.Shape(lq=40, lk=33, inputs=(5, 3, 6), width=3, value_width=1, rank=2),
    conditioned.Shape(lq=24, lk=24, inputs=(4, 4, 4), width=1, value_width=4, rank=1),
    conditioned.Shape(lq=64, lk=256, inputs=(3, 4, 3), width=2, value_width=2, rank=1),
)


def _scaled_inputs(rng, x, w, b):
    """Inputs up to 1e15 from their weights, which are as far from them the other way."""
    for name in x:
        s = 10.0 ** rng.uniform(-15, 15)
        x[name] = x[name] * s
        w[name] = w[name] / s
        b[name] = b[name] / s


def _repeated_tokens(rng, x, w, b):
    for name in ("query", "key"):
        n = len(x[name])
        few = rng.integers(max(n // 4, 1), size=n)
        x[name] = x[name][few]
        if name == "key":
            x["value"] = x["value"][few]


def _last_bits(rng, x, w, b):
    """Tokens that differ in their last bits."""
    for name in x:
        move = rng.integers(-2, 3, size=x[name].shape) * np.finfo(x[name].dtype).eps
        x[name] = (x[name][:1] * (1 + move)).astype(x[name].dtype)


def _cancelling(rng, x, w, b):
    """A large common column, of no weight or of weights that cancel it."""
    for name, rows in x.items():
        if rows.shape[1] > 1:
            rows = rows.copy()
            rows[:, 0] = 10.0 ** rng.uniform(0, 8) * rng.normal(size=len(rows))
            rows[:, 1] = rows[:, 1] * 10.0 ** rng.uniform(-8, 0) + rows[:, 0]
            x[name] = rows
            w[name] = w[name].copy()
            b[name] = b[name].copy()
            w[name][1] = -w[name][0]
            b[name][1] = -b[name][0]


def _offset(rng, x, w, b):
    for name in x:
        x[name] = x[name] + 10.0 ** rng.uniform(-2, 6) * rng.normal(size=x[name].shape[1])


TWISTS = {
    "as it is": None,
    "scaled inputs": _scaled_inputs,
    "repeated tokens": _repeated_tokens,
    "last bits": _last_bits,
    "cancelling": _cancelling,
    "offset": _offset,
}
TARGETS = ("as it is", "late in training", "far", "scaled", "vanishing values")


def output(problem):
    """The attention's output, in extended precision."""
    w = {n: np.asarray(getattr(problem.weights, n), np.longdouble) for n in conditioned.FULL}
    for n, adapter in problem.adapters.items():
        w[n] = w[n] + np.longdouble(problem.scale) * (
            np.asarray(adapter.b, np.longdouble) @ np.asarray(adapter.a, np.longdouble)
        )
    x = {n: np.asarray(getattr(problem, f"x_{n}"), np.longdouble) for n in conditioned.FULL}
    s = problem.beta * (x["query"] @ w["query"]) @ (x["key"] @ w["key"]).T
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True) @ (x["value"] @ w["value"])


def draw(rng, shape, adapt, dtype, powers=(-6, 1.2)):
    """(problem, its family): a kind of conditioned.py, a twist of its tokens, one of its target.

    powers: of 10, between which its scores reach.
    """
    kind = conditioned.KINDS[rng.integers(len(conditioned.KINDS))]
    twist = list(TWISTS)[rng.integers(len(TWISTS))] if rng.random() < 0.6 else "as it is"
    target = TARGETS[rng.integers(len(TARGETS))] if rng.random() < 0.6 else "as it is"
    reach, size = 10 ** rng.uniform(*powers), 10 ** rng.uniform(-3, 3)
    p = conditioned.make(
        int(rng.integers(2**31)),
        shape=shape,
        adapt=adapt,
        kind=kind,
        reach=reach,
        size=size,
        dtype=dtype,
    )
    x = {n: getattr(p, f"x_{n}") for n in conditioned.FULL}
    w = {n: getattr(p.weights, n) for n in conditioned.FULL}
    b = {n: p.adapters[n].b if n in p.adapters else np.zeros((len(w[n]), 1)) for n in w}
    if TWISTS[twist] is not None:
        TWISTS[twist](rng, x, w, b)
    y = p.target
    if target == "scaled":
        y = y * 10.0 ** rng.uniform(-15, 15)
    if target == "far":
        y = y + 10.0 ** rng.uniform(0, 8) * rng.choice([-1, 1])
    a = {n: p.adapters[n].a for n in p.adapters}
    if target == "vanishing values":
        s = 10.0 ** rng.uniform(-200 if dtype == np.float64 else -35, -20)
        w["value"] = w["value"] * s
        if "value" in a:
            a["value"] = a["value"] * s
        y = y if rng.random() < 0.5 else y * s

    def cast(v):
        return np.asarray(v, dtype)

    p = ll.LoRAProblem(
        cast(x["query"]),
        cast(x["key"]),
        cast(x["value"]),
        cast(y),
        weights=ll.AttentionWeights(**{n: cast(v) for n, v in w.items()}),
        adapters={n: ll.Adapter(cast(a[n]), cast(b[n])) for n in adapt},
        scale=p.scale,
        beta=p.beta,
    )
    if target == "late in training":
        near = output(p)
        near = near + 10.0 ** rng.uniform(-12, -4) * np.abs(near).max() * rng.normal(size=y.shape)
        p = with_target(p, cast(near))
    return p, f"{kind} / {twist} / {target}"


def with_target(p, target):
    """The same problem with another target."""
    return ll.LoRAProblem(
        p.x_query,
        p.x_key,
        p.x_value,
        target,
        weights=p.weights,
        adapters=p.adapters,
        scale=p.scale,
        beta=p.beta,
    )


def method_of(rng):
    """A method drawn at random."""
    return ll.Polynomial(
        int(rng.integers(9)),
        SERIES[rng.integers(len(SERIES))],
        centred=bool(rng.random() < 0.8),
        block_size=(1, 3, 7, None)[rng.integers(4)],
    )


def compiled(method):
    """Gradients of a batch of conditioned."""
    return quick_jit(jax.vmap(lambda p: ll.gradient(p, method)))


def families(count, seed=0, dtype=np.float64, batch=200):
    """`count` problems, `batch` to a method, shape and set of adapters; by kind, by twist, by
    target.
    """
    rng = np.random.default_rng(seed)
    tallies = {}
    for _ in range(-(-count // batch)):
        shape = SHAPES[rng.integers(len(SHAPES))]
        adapt = conditioned.SUBSETS[rng.integers(len(conditioned.SUBSETS))]
        method = method_of(rng)
        many, names = zip(*(draw(rng, shape, adapt, dtype) for _ in range(batch)), strict=True)
        stacked = conditioned.stack(many)
        result = jax.tree.map(np.asarray, compiled(method)(stacked))
        jax.clear_caches()
        with np.errstate(all="ignore"):
            want = extended.gradients(stacked)
        worst, finite = ratios(result, want)
        for i, name in enumerate(names):
            say = f"{name}, {method}, {shape}, {adapt}, number {i}"
            for part in zip(("kind", "twist", "target"), name.split(" / "), strict=True):
                tally = tallies.setdefault(": ".join(part), Tally())
                tally.add(worst[i], finite[i], say)
    return tallies
