"""The definitions, in float64 NumPy: slow, obvious, and without a line from the library."""

import numpy as np


def loss_and_gradient(problem):
    """(loss, {name: (dA, dB)}) of Definitions 1.2, 3.1 and A.1, one query at a time, from dl/dW_m
    in full.
    """
    scale, beta = float(problem.scale), float(problem.beta)
    x = {
        name: np.asarray(getattr(problem, f"x_{name}"), np.float64)
        for name in ("query", "key", "value")
    }
    w = {name: np.asarray(getattr(problem.weights, name), np.float64) for name in x}
    ab = {
        name: (np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64))
        for name, adapter in problem.adapters.items()
    }
    for name, (a, b) in ab.items():
        w[name] = w[name] + scale * b @ a
    q, k, v = (x[name] @ w[name] for name in ("query", "key", "value"))
    y = np.asarray(problem.target, np.float64)
    loss, dq, dk, dv = 0.0, np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for i in range(len(q)):
        scores = np.array([beta * q[i] @ k[j] for j in range(len(k))])
        e = np.exp(scores - scores.max())
        f = e / e.sum()
        out = sum(f[j] * v[j] for j in range(len(k)))
        c = out - y[i]
        loss += 0.5 * c @ c
        for j in range(len(k)):
            # d out / d score_j = f_j (v_j - out)
            d_score = f[j] * (c @ (v[j] - out))
            dq[i] += beta * d_score * k[j]
            dk[j] += beta * d_score * q[i]
            dv[j] += f[j] * c
    dw = {"query": x["query"].T @ dq, "key": x["key"].T @ dk, "value": x["value"].T @ dv}
    return loss, {
        name: (scale * b.T @ dw[name], scale * dw[name] @ a.T) for name, (a, b) in ab.items()
    }


def scores(problem):
    """S = beta Q K^T."""
    x, w = (problem.x_query, problem.x_key), (problem.weights.query, problem.weights.key)
    out = []
    for name, xs, ws in zip(("query", "key"), x, w, strict=True):
        ws = np.asarray(ws, np.float64)
        if name in problem.adapters:
            adapter = problem.adapters[name]
            ws = ws + float(problem.scale) * np.asarray(adapter.b, np.float64) @ np.asarray(
                adapter.a, np.float64
            )
        out.append(np.asarray(xs, np.float64) @ ws)
    return float(problem.beta) * out[0] @ out[1].T


def extended_gradients(batch, times_query=None, times_key=None):
    """{name: (dA, dB)} for a batch of problems, in extended precision: the oracle of the
    certificate.

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
