"""Attacks on the certificate: inputs of every kind, hill climbing on error / bound, long sequences
by multiplicity.

    python -m tests.certificate.attack [families | hill_climb | long_sequences | directed] [count] [seed]

Each function returns {family: Tally} and never stops at a violation. A finite bound that is below
the error is one; an infinite bound promises nothing.
"""

import dataclasses
import sys
import time

import jax
import numpy as np

import lora_limits as ll
from lora_limits.instruments.compiling import quick_jit
from tests.support import problems, reference

SERIES = ("taylor", "taylor", "chebyshev", "fitted")
DTYPES = (np.float64, np.float32)
SHAPES = (
    *problems.SHAPES.values(),
    problems.Shape(lq=40, lk=33, inputs=(5, 3, 6), width=3, value_width=1, rank=2),
    problems.Shape(lq=24, lk=24, inputs=(4, 4, 4), width=1, value_width=4, rank=1),
    problems.Shape(lq=64, lk=256, inputs=(3, 4, 3), width=2, value_width=2, rank=1),
)


@dataclasses.dataclass
class Tally:
    """What became of the problems of one family."""

    problems: int = 0
    finite: int = 0
    worst: float = 0.0  # the largest error / bound
    broken: list = dataclasses.field(default_factory=list)  # descriptions

    def add(self, ratio, finite, describe):
        self.problems += 1
        self.finite += bool(finite)
        self.worst = max(self.worst, ratio)
        if not ratio <= 1:
            self.broken.append((ratio, describe))

    def __str__(self):
        said = f"{self.problems:6d} problems, {self.finite:6d} finite, error / bound at most {self.worst:.3g}"
        return said + "".join(f"\n    BROKEN {r:.3g} {d}" for r, d in self.broken[:5])


def ratios(result, want):
    """(n,) the largest error / bound of each problem over arrays with a finite bound; (n,) whether
    all are finite.
    """
    worst, finite = 0.0, True
    for name, pair in want.items():
        for half, exact in zip("ab", pair, strict=True):
            got = np.asarray(getattr(result.gradient[name], half)).astype(np.longdouble)
            bound = np.asarray(getattr(result.bound[name], half)).astype(np.longdouble)
            known = np.isfinite(exact).all((1, 2))  # else the reference itself has overflowed
            with np.errstate(invalid="ignore", divide="ignore"):
                error = np.abs(got - exact).max((1, 2))
                ratio = np.where(error == 0, 0, error / bound)
            ratio = np.where(np.isnan(error) | np.isnan(bound), np.inf, ratio)
            ratio = np.where(np.isinf(bound) | ~known, 0, ratio)
            worst = np.maximum(worst, ratio.astype(float))
            finite = finite & np.isfinite(bound)
    return np.asarray(worst), np.asarray(finite)


# ------------------------------------------------------------------------------------ families


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
    w = {n: np.asarray(getattr(problem.weights, n), np.longdouble) for n in problems.FULL}
    for n, adapter in problem.adapters.items():
        w[n] = w[n] + np.longdouble(problem.scale) * (
            np.asarray(adapter.b, np.longdouble) @ np.asarray(adapter.a, np.longdouble)
        )
    x = {n: np.asarray(getattr(problem, f"x_{n}"), np.longdouble) for n in problems.FULL}
    s = problem.beta * (x["query"] @ w["query"]) @ (x["key"] @ w["key"]).T
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True) @ (x["value"] @ w["value"])


def draw(rng, shape, adapt, dtype, powers=(-6, 1.2)):
    """(problem, its family): a kind of problems.py, a twist of its tokens, one of its target.

    powers: of 10, between which its scores reach.
    """
    kind = problems.KINDS[rng.integers(len(problems.KINDS))]
    twist = list(TWISTS)[rng.integers(len(TWISTS))] if rng.random() < 0.6 else "as it is"
    target = TARGETS[rng.integers(len(TARGETS))] if rng.random() < 0.6 else "as it is"
    reach, size = 10 ** rng.uniform(*powers), 10 ** rng.uniform(-3, 3)
    p = problems.make(
        int(rng.integers(2**31)),
        shape=shape,
        adapt=adapt,
        kind=kind,
        reach=reach,
        size=size,
        dtype=dtype,
    )
    x = {n: getattr(p, f"x_{n}") for n in problems.FULL}
    w = {n: getattr(p.weights, n) for n in problems.FULL}
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
        *(cast(x[n]) for n in problems.FULL),
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
    """Gradients of a batch of problems."""
    return quick_jit(jax.vmap(lambda p: ll.gradient(p, method)))


def families(count, seed=0, dtype=np.float64, batch=200):
    """`count` problems, `batch` to a method, shape and set of adapters; by kind, by twist, by
    target.
    """
    rng = np.random.default_rng(seed)
    tallies = {}
    for _ in range(-(-count // batch)):
        shape = SHAPES[rng.integers(len(SHAPES))]
        adapt = problems.SUBSETS[rng.integers(len(problems.SUBSETS))]
        method = method_of(rng)
        many, names = zip(*(draw(rng, shape, adapt, dtype) for _ in range(batch)), strict=True)
        stacked = problems.stack(many)
        result = jax.tree.map(np.asarray, compiled(method)(stacked))
        jax.clear_caches()
        with np.errstate(all="ignore"):
            want = reference.extended_gradients(stacked)
        worst, finite = ratios(result, want)
        for i, name in enumerate(names):
            say = f"{name}, {method}, {shape}, {adapt}, number {i}"
            for part in zip(("kind", "twist", "target"), name.split(" / "), strict=True):
                tally = tallies.setdefault(": ".join(part), Tally())
                tally.add(worst[i], finite[i], say)
    return tallies


# ------------------------------------------------------------------------------------ climbing


def mutated(rng, problem, step):
    """Entries moved, arrays scaled, tokens copied, offsets added, targets drawn to the output."""

    def change(v):
        v = np.asarray(v)
        if v.ndim == 0 or rng.random() < 0.4:
            return v
        how = rng.integers(7)
        if how == 0:
            return v * (1 + step * rng.normal(size=v.shape))
        if how == 1:
            new = v + step * np.abs(v).max() * rng.normal(size=v.shape)
            return np.where(rng.random(v.shape) < 0.7, v, new)
        if how == 2:
            return v * 10 ** (step * rng.normal())
        if how == 3:
            return v + step * np.abs(v).max() * rng.normal(size=v.shape[1])
        new = v.copy()
        i, j = rng.integers(len(v), size=2)
        if how == 4:
            new[i] = v[j]
        elif how == 5:
            new[i] = v[i] * 10 ** rng.normal()
        else:
            new[i] = -v[i]
        return new

    out = jax.tree.map(lambda v: np.asarray(change(v), np.asarray(v).dtype), problem)
    if rng.random() < 0.1:
        with np.errstate(all="ignore"):
            near = output(out)
        near = near + step * 10.0 ** rng.uniform(-10, 0) * np.abs(near).max() * rng.normal(
            size=near.shape
        )
        if np.isfinite(near.astype(out.target.dtype)).all():
            out = with_target(out, near.astype(out.target.dtype))
    return out


def climb(method, shape, adapt, seconds, seed=0, dtype=np.float64, pool=48, powers=(-6, 1.2)):
    """(Tally, the worst problem): one climb, of `pool` problems at a time."""
    rng = np.random.default_rng(seed)
    run = compiled(method)
    tally, started = Tally(), time.monotonic()
    parents = [draw(rng, shape, adapt, dtype, powers)[0] for _ in range(pool)]
    scores = np.full(pool, -1.0)
    best = None
    children = parents
    while time.monotonic() - started < seconds:
        stacked = problems.stack(children)
        with np.errstate(all="ignore"):
            worst, finite = ratios(
                jax.tree.map(np.asarray, run(stacked)), reference.extended_gradients(stacked)
            )
        for i in range(len(children)):
            tally.add(worst[i], finite[i], f"{method}, {shape}, {adapt}")
        everyone = [*parents, *children] if scores[0] >= 0 else list(children)
        scores = np.concatenate([scores, worst]) if scores[0] >= 0 else worst
        order = np.argsort(-scores, kind="stable")[: pool // 3]
        parents, scores = [everyone[i] for i in order], scores[order]
        best = parents[0]
        step = 10 ** rng.uniform(-3, 0.3)
        children = [
            mutated(rng, parents[rng.integers(len(parents))], step) for _ in range(pool - 4)
        ]
        children += [draw(rng, shape, adapt, dtype, powers)[0] for _ in range(4)]
    return tally, best


def hill_climb(count, seed=0, dtype=np.float64, seconds=30.0):
    """`count` climbs, each of a method, a shape and a set of adapters of its own.

    Every second one starts where rounding is all there is: at a high degree and small scores.
    """
    rng = np.random.default_rng(seed)
    tallies = {}
    for i in range(count):
        shape = SHAPES[rng.integers(len(SHAPES) - 1)]
        adapt = problems.SUBSETS[rng.integers(len(problems.SUBSETS))]
        method = method_of(rng)
        powers = (-6, 1.2)
        if i % 2:
            method, powers = dataclasses.replace(method, degree=8, series="taylor"), (-6, -2)
        tally, _ = climb(method, shape, adapt, seconds, seed + i, dtype, powers=powers)
        jax.clear_caches()
        tallies[f"{i}: {method.series} {method.degree} {'+'.join(adapt)}"] = tally
    return tallies


# ------------------------------------------------------------------------------------ long sequences


def few_tokens(rng, dtype):
    """(few distinct tokens as a problem, how often each query occurs, and each key)."""
    shape = problems.Shape(
        lq=int(rng.integers(1, 5)),
        lk=int(rng.integers(1, 7)),
        inputs=(2, 2, 2),
        width=int(rng.integers(1, 3)),
        value_width=int(rng.integers(1, 3)),
        rank=1,
    )
    kind = ("gaussian", "nearly equal tokens", "signs", "equal keys", "exact fit", "large biases")
    p = problems.make(
        int(rng.integers(2**31)),
        shape=shape,
        adapt=problems.SUBSETS[rng.integers(len(problems.SUBSETS))],
        kind=kind[rng.integers(len(kind))],
        reach=10 ** rng.uniform(-3, 0.5),
        size=10 ** rng.uniform(-1, 1),
        dtype=dtype,
    )
    length = 2 ** int(rng.integers(16, 21))

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


def long_sequences(count, seed=0, dtype=np.float64, blocks=(64, 512, None)):
    """`count` problems of 2^16 to 2^20 tokens, few of them distinct; the reference counts them."""
    rng = np.random.default_rng(seed)
    tally = Tally()
    for i in range(count):
        p, nq, nk = few_tokens(rng, dtype)
        many = repeated(p, nq, nk, None if rng.random() < 0.5 else i)
        method = ll.Polynomial(
            int(rng.integers(1, 8)), block_size=blocks[rng.integers(len(blocks))]
        )
        result = jax.tree.map(
            lambda v: np.asarray(v)[None], quick_jit(ll.gradient, static_argnums=1)(many, method)
        )
        want = reference.extended_gradients(problems.stack([p]), nq[None], nk[None])
        worst, finite = ratios(result, want)
        tally.add(worst[0], finite[0], f"{method}, {nq}, {nk}, number {i}")
        jax.clear_caches()
    return {"few distinct tokens": tally}


# ------------------------------------------------------------------------------------ directed


def _build(x, target, w, ab, dtype, beta=1.0):
    def cast(v):
        return np.asarray(v, dtype)

    return ll.LoRAProblem(
        *(cast(x[n]) for n in problems.FULL),
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
    return _build(x, -rng.uniform(0.5, 1, (4, 1)), w, ab, dtype)


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
    return _build(x, target, w, ab, dtype)


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
    return _build(x, rng.normal(size=(n, 2)), w, ab, dtype, beta=10.0 ** rng.uniform(0, 4))


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
            worst, finite = ratios(result, reference.extended_gradients(problems.stack([p])))
            tally.add(worst[0], finite[0], f"{several[i % len(runs)]}, number {i}")
        jax.clear_caches()
    return tallies


ATTACKS = {
    "families": families,
    "hill_climb": hill_climb,
    "long_sequences": long_sequences,
    "directed": directed,
}


def main(name="families", count="2000", seed="0"):
    """One attack in both dtypes, a line a family."""
    for dtype in DTYPES:
        for family, tally in ATTACKS[name](int(count), int(seed), dtype).items():
            print(f"{np.dtype(dtype)} {family:40s} {tally}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*sys.argv[1:])
