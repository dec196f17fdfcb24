"""Problems of controlled conditioning, well behaved and degenerate, as NumPy arrays: one seed, one
problem.
"""

import dataclasses

import numpy as np

from lora_limits import Adapter, AttentionWeights, LoRAProblem

PARTIAL = ("query", "value")
FULL = ("query", "key", "value")
SUBSETS = (("query",), ("key",), ("value",), PARTIAL, ("query", "key"), ("key", "value"), FULL)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a problem. inputs: d_model of the queries, keys and values."""

    lq: int = 13
    lk: int = 13
    inputs: tuple[int, int, int] = (4, 4, 4)
    width: int = 2
    value_width: int = 2
    rank: int = 2


SELF = Shape()
CROSS = Shape(lq=11, lk=17, inputs=(3, 5, 4), width=2, value_width=3, rank=1)
SMALLEST = Shape(lq=1, lk=1, inputs=(1, 1, 1), width=1, value_width=1, rank=1)
ONE_KEY = Shape(lq=5, lk=1, inputs=(3, 2, 2), width=2, value_width=1, rank=2)
ONE_QUERY = Shape(lq=1, lk=9, inputs=(2, 3, 3), width=3, value_width=2, rank=3)
SHAPES = {
    "self": SELF,
    "cross": CROSS,
    "smallest": SMALLEST,
    "one key": ONE_KEY,
    "one query": ONE_QUERY,
}


def _plain(rng, shape):
    """Independent gaussian everything."""
    x = {
        n: rng.normal(size=(length, width))
        for n, length, width in zip(FULL, (shape.lq, shape.lk, shape.lk), shape.inputs, strict=True)
    }
    out = {"query": shape.width, "key": shape.width, "value": shape.value_width}
    w = {n: rng.normal(size=(x[n].shape[1], out[n])) / x[n].shape[1] ** 0.5 for n in FULL}
    a = {n: 0.5 * rng.normal(size=(shape.rank, out[n])) for n in FULL}
    b = {n: 0.5 * rng.normal(size=(x[n].shape[1], shape.rank)) for n in FULL}
    return x, w, a, b, rng.normal(size=(shape.lq, shape.value_width))


def _self_attention(rng, x, w, a, b, y):
    if x["query"].shape == x["key"].shape == x["value"].shape:
        x["key"] = x["value"] = x["query"]


def _one_hot(rng, x, w, a, b, y):
    for n, rows in x.items():
        x[n] = np.eye(rows.shape[1])[rng.integers(rows.shape[1], size=len(rows))]


def _equal_keys(rng, x, w, a, b, y):
    x["key"][:] = x["key"][0]


def _equal_tokens(rng, x, w, a, b, y):
    for rows in x.values():
        rows[:] = rows[0]


def _nearly_equal(rng, x, w, a, b, y):
    """Tokens that differ in the fifth digit: everything centred is made of cancellation."""
    for n, rows in x.items():
        x[n] = rows[:1] + 1e-5 * rng.normal(size=rows.shape)


def _hidden(rng, x, w, a, b, y):
    """Large inputs that the projections cancel: two columns, nearly equal, with opposite
    weights.
    """
    for n, rows in x.items():
        if rows.shape[1] > 1:
            rows[:, -2] = 1e4 * rng.normal(size=len(rows))
            rows[:, -1] += rows[:, -2]
            w[n][-2] = -w[n][-1]
            b[n][-2] = -b[n][-1]


def _huge_key(rng, x, w, a, b, y):
    x["key"][rng.integers(len(x["key"]))] *= 1e4


def _rank_one(rng, x, w, a, b, y):
    for n in ("query", "key"):
        w[n][:, 1:] = 0
        a[n][:, 1:] = 0


def _zero_adapters(rng, x, w, a, b, y):
    """A fresh adapter: B = 0; every second time both halves."""
    both = rng.integers(2)
    for n in FULL:
        b[n][:] = 0
        a[n][:] *= 1 - both


def _zero_target(rng, x, w, a, b, y):
    y[:] = 0


def _signs(rng, x, w, a, b, y):
    """Inputs and weights of +-1: equal tokens round alike."""
    for table in (x, w, a, b):
        for n in table:
            table[n] = np.where(table[n] > 0, 1.0, -1.0)


def _outlier_tokens(rng, x, w, a, b, y):
    for rows in x.values():
        rows[rng.integers(len(rows), size=1 + len(rows) // 16)] *= 30


def _clustered(rng, x, w, a, b, y):
    for n, rows in x.items():
        centres = 2 * rng.normal(size=(3, rows.shape[1]))
        x[n] = centres[rng.integers(3, size=len(rows))] + 1e-3 * rows


def _anisotropic(rng, x, w, a, b, y):
    for rows in x.values():
        rows *= 10.0 ** -np.arange(rows.shape[1])[None]


def _biases(rng, x, w, a, b, y):
    """A column of ones whose weights dwarf the rest: centring has to take them away."""
    for n, rows in x.items():
        rows[:, -1] = 1
        w[n][-1] = 20 * rng.normal(size=w[n].shape[1])
        b[n][-1] = 0


def _vast_biases(rng, x, w, a, b, y):
    _biases(rng, x, w, a, b, y)
    for n in x:
        w[n][-1] *= 50
    y += w["value"][-1]


def _single_value(rng, x, w, a, b, y):
    x["value"][:] = 0
    x["value"][rng.integers(len(x["value"])), rng.integers(x["value"].shape[1])] = 1


def _far_value(rng, x, w, a, b, y):
    """The most informative key sits where the polynomial is worst: the value rides on one extreme
    token.
    """
    j = np.argmax((x["key"] ** 2).sum(1))
    x["key"][j] *= 4
    x["value"][j] *= 50


def _exact_fit(rng, x, w, a, b, y):
    """Targets equal to the mean value, so that residuals are small and errors come from
    cancellation.
    """
    y[:] = (x["value"] @ (w["value"] + b["value"] @ a["value"])).mean(0)


CHANGES = {
    "gaussian": None,
    "self attention": _self_attention,
    "one-hot": _one_hot,
    "equal keys": _equal_keys,
    "equal tokens": _equal_tokens,
    "nearly equal tokens": _nearly_equal,
    "hidden direction": _hidden,
    "one huge key": _huge_key,
    "rank-one scores": _rank_one,
    "zero adapters": _zero_adapters,
    "zero target": _zero_target,
    "signs": _signs,
    "outlier tokens": _outlier_tokens,
    "clustered": _clustered,
    "anisotropic": _anisotropic,
    "large biases": _biases,
    "vast biases": _vast_biases,
    "single value": _single_value,
    "far value": _far_value,
    "exact fit": _exact_fit,
}
KINDS = tuple(CHANGES)
MODERATE = ("gaussian", "self attention", "clustered", "anisotropic", "outlier tokens")


def _spread(scores):
    """Largest centred score: what the polynomial has to cope with."""
    centred = scores - scores.mean(0, keepdims=True)
    return np.abs(centred - centred.mean(1, keepdims=True)).max()


def make(seed, *, shape=SELF, adapt=FULL, kind="gaussian", reach=1.0, size=1.0, dtype=np.float64):
    """A problem of the given kind whose centred scores reach `reach`; values and targets are `size`
    times order one.

    scale and beta are not representable in float32. Where all centred scores vanish, they are left
    alone.
    """
    rng = np.random.default_rng(seed)
    x, w, a, b, y = _plain(rng, shape)
    if CHANGES[kind] is not None:
        CHANGES[kind](rng, x, w, a, b, y)
    scale, beta = 2.0 / (3 * shape.rank), 0.7 / shape.width
    full = {n: w[n] + scale * b[n] @ a[n] if n in adapt else w[n] for n in FULL}
    spread = beta * _spread(x["query"] @ full["query"] @ (x["key"] @ full["key"]).T)
    factor = (reach / spread) ** 0.5 if spread > 1e-9 else 1.0
    for n in ("query", "key"):
        w[n], a[n] = w[n] * factor, a[n] * factor
    w["value"], a["value"], y = w["value"] * size, a["value"] * size, y * size

    def cast(table):
        return {n: np.asarray(v, dtype) for n, v in table.items()}

    x, w, a, b = cast(x), cast(w), cast(a), cast(b)
    return LoRAProblem(
        x["query"],
        x["key"],
        x["value"],
        np.asarray(y, dtype),
        weights=AttentionWeights(**w),
        adapters={n: Adapter(a[n], b[n]) for n in adapt},
        scale=scale,
        beta=beta,
    )


def stack(many):
    """A batch of problems of one shape, every leaf with a leading axis, for vmap."""
    import jax

    return jax.tree.map(lambda *leaves: np.stack([np.asarray(v) for v in leaves]), *many)
