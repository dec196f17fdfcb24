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
