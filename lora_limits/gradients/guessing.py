"""A first guess of the degree at which the certificate reaches a tolerance, on the host."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from lora_limits.coordinates import frame as frames
from lora_limits.problem import Adapter, LoRAProblem, inputs

ROWS = 48  # sampled queries

_frame = jax.jit(frames.of_problem)


class _Array(NamedTuple):
    """What one gradient array has on either side of the error of f."""

    name: str  # of the adapter
    half: str
    u: np.ndarray  # (rows,) the largest entry of what stands before a query
    column: np.ndarray  # (Lk,) the largest square of what stands after a key


class _Tokens(NamedTuple):
    """Sampled queries and all keys in float64, centred by the problem's frame."""

    s: np.ndarray  # (rows, Lk) centred scores
    w: np.ndarray  # (Lk,) weights, their sum 1
    residual: np.ndarray  # (rows,) |c_i|
    spread: np.ndarray  # (Lk,) |v_j|^2
    arrays: list[_Array]
    share: float  # how many queries each sampled one stands for, times |scale|


def _wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def _project(problem: LoRAProblem, name: str, x: np.ndarray) -> np.ndarray:
    rows = x @ _wide(getattr(problem.weights, name))
    if name in problem.adapters:
        adapter = problem.adapters[name]
        rows += float(problem.scale) * (x @ _wide(adapter.b)) @ _wide(adapter.a)
    return rows


def _tokens(problem: LoRAProblem) -> _Tokens:
    frame = jax.tree.map(_wide, _frame(problem))
    x = {name: _wide(value) for name, value in inputs(problem).items()}
    pick = np.unique(np.linspace(0, len(x["query"]) - 1, ROWS).astype(int))
    xq = x["query"][pick]
    q = _project(problem, "query", xq) - frame.nu
    k = _project(problem, "key", x["key"]) - frame.mu
    log_w = frame.beta * k @ frame.nu
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    s = frame.beta * q @ k.T
    f = w * np.exp(s - s.max(1, keepdims=True))
    f /= f.sum(1, keepdims=True)
    v = _project(problem, "value", x["value"])
    residual = f @ v - _wide(problem.target)[pick]
    share = abs(float(problem.scale)) * len(x["query"]) / len(pick)
    return _Tokens(
        s,
        w,
        np.sqrt((residual**2).sum(1)),
        ((v - frame.v_mean) ** 2).sum(1),
        _arrays(problem, frame, xq, q, k, x),
        share,
    )


def _arrays(problem: LoRAProblem, frame: frames.Frame, xq, q, k, x) -> list[_Array]:
    """The sides of every array: (before a query, after a key) for dA and for dB."""
    one = np.ones((len(q), 1))
    out = []
    for name, adapter in problem.adapters.items():
        a = _wide(adapter.a)
        b = _wide(adapter.b)
        if name == "query":
            pairs = (xq @ b, frame.beta * k), (xq, frame.beta * k @ a.T)
        elif name == "key":
            xk = x["key"] - frame.xk_mean
            pairs = (q, frame.beta * xk @ b), (q @ a.T, frame.beta * xk)
        else:
            xv = x["value"] - frame.xv_mean
            pairs = (one, xv @ b), (one, xv)
        for half, (u, column) in zip("ab", pairs, strict=True):
            out.append(_Array(name, half, np.abs(u).max(1), (column**2).max(1)))
    return out


def guess(
    problem: LoRAProblem,
    tolerance: float,
    most: int,
    largest: dict[str, Adapter] | None = None,
) -> int:
    """The degree at which the certificate should first reach the tolerance, from a few exact rows.

    For every degree up to `most`, the leading term of the certificate, sum_i |u_i| |c_i|
    sqrt(eta'[v^2] eta'[k^2]), is computed from the true remainders on ROWS sampled queries and
    scaled to all; most + 1 where none is small enough. Only a guess: `choose` accepts nothing but
    a promise. largest: entries that the tolerance is relative to, if it is.
    O(ROWS Lk (d + most)) on the host.
    """
    t = _tokens(problem)
    width = math.sqrt(problem.weights.value.shape[1])
    exp = np.exp(t.s)
    p = np.zeros_like(t.s)
    term = np.ones_like(t.s)
    for degree in range(most + 1):
        # P_{g-1}, P_g
        lower, p = p, p + term
        term = term * t.s / (degree + 1)
        total = np.maximum((t.w * p).sum(1, keepdims=True), 1e-300)
        worst = 0.0
        for array in t.arrays:
            left = t.w * np.abs(exp - (p if array.name == "value" else lower)) / total
            e = t.residual / width * np.sqrt((left @ t.spread) * (left @ array.column))
            unit = 1.0 if largest is None else getattr(largest[array.name], array.half)
            worst = max(worst, t.share * float((array.u * e).sum()) * 2 / (unit or 1.0))
        if worst <= tolerance:
            return degree
    return most + 1
