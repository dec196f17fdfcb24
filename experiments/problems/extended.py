"""The oracle of the certificate: gradients in extended precision, in NumPy alone."""

from __future__ import annotations

import numpy as np


def gradients(batch, times_query=None, times_key=None):
    """{name: (dA, dB)} for a batch of problems, in extended precision.

    Keys and values are first shifted by the row that receives the most attention, which changes no
    gradient: so equal tokens give exact zeros, and neither a common bias nor a saturated softmax
    costs digits. Leading batch axis. times_query, times_key: (batch, tokens) how often each token
    occurs, once if None.
    """

    def wide(v):
        return np.asarray(v, np.longdouble)

    nq = wide(1 if times_query is None else times_query[..., None])
    nk = wide(1 if times_key is None else times_key[:, None])

    scale, beta = (wide(v)[:, None, None] for v in (batch.scale, batch.beta))
    x = {name: wide(getattr(batch, f"x_{name}")) for name in ("query", "key", "value")}
    ab = {name: (wide(adapter.a), wide(adapter.b)) for name, adapter in batch.adapters.items()}
    w = {name: wide(getattr(batch.weights, name)) for name in x}
    for name, (a, b) in ab.items():
        w[name] = w[name] + scale * b @ a
    q = x["query"] @ w["query"]

    def attention(x_key):
        s = beta * q @ (x_key @ w["key"]).mT
        e = np.exp(s - s.max(-1, keepdims=True)) * nk
        return e / e.sum(-1, keepdims=True)

    top = (attention(x["key"] - x["key"][:, :1]) * nq).sum(1).argmax(1)[:, None, None]
    anchor = {name: np.take_along_axis(x[name], top, 1) for name in ("key", "value")}
    x_key, x_value = x["key"] - anchor["key"], x["value"] - anchor["value"]
    f, k, v = attention(x_key), x_key @ w["key"], x_value @ w["value"]
    out = f @ v
    c = out - (wide(batch.target) - anchor["value"] @ w["value"])
    p = f * (c @ v.mT - (c * out).sum(-1, keepdims=True)) * nq
    rows = {"query": beta * p @ k, "key": beta * p.mT @ q, "value": f.mT @ (c * nq)}
    inputs = {
        "query": x["query"],
        "key": x_key,
        "value": x["value"],
    }  # p 1 = 0, so the rows of "key" sum to 0
    return {
        name: (
            scale * (inputs[name] @ b).mT @ rows[name],
            scale * inputs[name].mT @ (rows[name] @ a.mT),
        )
        for name, (a, b) in ab.items()
    }
