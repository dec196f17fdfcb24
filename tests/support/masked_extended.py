"""The oracle of the promises on causal, rotary, padded and packed problems: gradients in extended
precision, dense, in NumPy alone.
"""

import numpy as np

NAMES = ("query", "key", "value")


def wide(x):
    return np.asarray(x, np.longdouble)


def turned(x, angles):
    n = angles.shape[-1]
    cos, sin = np.cos(wide(angles)), np.sin(wide(angles))
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def who_sees_whom(batch):
    """(..., Lq, Lk): by the causal order, the key mask, runs of equal segments."""
    lq, lk = batch.x_query.shape[-2], batch.x_key.shape[-2]
    seen = np.ones((*batch.x_query.shape[:-2], lq, lk), bool)
    if batch.causal:
        seen &= np.tril(np.ones((lq, lk), bool))
    if batch.key_mask is not None:
        seen &= np.asarray(batch.key_mask)[..., None, :]
    if batch.segments is not None:
        new = np.diff(np.asarray(batch.segments), axis=-1, prepend=0) != 0
        run = np.cumsum(new, -1)
        seen &= run[..., :, None] == run[..., None, :]
    return seen


def projected(batch, name, x):
    """x (W + s B A), turned."""
    rows = x @ wide(getattr(batch.weights, name))
    if name in batch.adapters:
        a, b = (wide(getattr(batch.adapters[name], half)) for half in "ab")
        rows = rows + wide(batch.scale)[..., None, None] * (x @ b) @ a
    if batch.rotations is not None and name != "value":
        rows = turned(rows, getattr(batch.rotations, name))
    return rows


def factor(batch, q, k):
    """f; 0 for a query that sees nothing."""
    seen = who_sees_whom(batch)
    s = wide(batch.beta)[..., None, None] * q @ k.swapaxes(-1, -2)
    top = np.where(seen, s, -np.inf).max(-1, keepdims=True)
    e = np.where(seen, np.exp(np.where(seen, s - np.where(np.isfinite(top), top, 0), 0)), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), np.finfo(np.longdouble).tiny)


def output(batch):
    """The outputs of all queries."""
    x = {name: wide(getattr(batch, f"x_{name}")) for name in NAMES}
    rows = {name: projected(batch, name, x[name]) for name in NAMES}
    return factor(batch, rows["query"], rows["key"]) @ rows["value"]


def gradients(batch):
    """{name: (dA, dB)} of a problem, or of a batch of them.

    Keys and values are taken relative to the most attended token, which moves no gradient: equal
    tokens then give exact zeros. Keys are turned before that, values subtracted before they are
    projected.
    """
    scale, beta = (wide(z)[..., None, None] for z in (batch.scale, batch.beta))
    x = {name: wide(getattr(batch, f"x_{name}")) for name in NAMES}
    q, k = (projected(batch, name, x[name]) for name in ("query", "key"))
    asked = np.ones(q.shape[:-1]) if batch.query_mask is None else np.asarray(batch.query_mask)
    f = factor(batch, q, k) * asked[..., None]
    at = f.sum(-2).argmax(-1)[..., None, None]
    k = k - np.take_along_axis(k, at, -2)
    anchor = np.take_along_axis(x["value"], at, -2)
    v = projected(batch, "value", x["value"] - anchor)
    out = f @ v
    sees = f.sum(-1, keepdims=True)
    # f sums to 1, or to 0 where a query sees nothing
    target = wide(batch.target) - np.where(sees > 0, projected(batch, "value", anchor), 0)
    c = (out - target) * asked[..., None]
    p = f * (c @ v.swapaxes(-1, -2) - (c * out).sum(-1, keepdims=True))
    back = {
        "query": beta * p @ k,
        "key": beta * p.swapaxes(-1, -2) @ q,
        "value": f.swapaxes(-1, -2) @ c,
    }
    found = {}
    for name, adapter in batch.adapters.items():
        rows = back[name]
        if batch.rotations is not None and name != "value":
            rows = turned(rows, -np.asarray(getattr(batch.rotations, name)))
        a, b = wide(adapter.a), wide(adapter.b)
        left = (x[name] @ b).swapaxes(-1, -2)
        of_b = x[name].swapaxes(-1, -2) @ (rows @ a.swapaxes(-1, -2))
        found[name] = (scale * left @ rows, scale * of_b)
    return found
