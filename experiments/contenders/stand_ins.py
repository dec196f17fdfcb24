"""What may stand in for f = softmax(S): formed entry by entry, so that widths can be tried whose
features could never be, and the gradient that it gives.

Each takes S (L, L) and returns a matrix whose rows are normalised afterwards. O(L^2) or more: these
bound what a fast method of that width could answer, and are none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_limits.instruments.comparing import softmax
from lora_limits.problem import Adapter, LoRAProblem, projections


def chebyshev(s: np.ndarray, degree: int) -> np.ndarray:
    """P_g(S), P_g the Chebyshev interpolant of exp(s - max) on [min S, max S]. Its range is read
    from S: exact.
    """
    low = float(s.min())
    high = float(s.max())
    series = np.polynomial.Chebyshev.interpolate(lambda x: np.exp(x - high), degree, [low, high])
    return series(s)


def columns(s: np.ndarray, k: int) -> np.ndarray:
    """f projected on the span of k of its columns, drawn uniformly (with one seed for each k)."""
    f = softmax(s)
    chosen = np.random.default_rng(k).choice(f.shape[1], k, replace=False)
    basis, size, _ = np.linalg.svd(f[:, chosen], full_matrices=False)
    # Columns that are copies of others, to rounding, span nothing new.
    basis = basis[:, size > 1e-10 * size[0]]
    return basis @ (basis.T @ f)


def truncated(s: np.ndarray, k: int) -> np.ndarray:
    """The nearest matrix of rank k to f."""
    u, size, v = np.linalg.svd(softmax(s), full_matrices=False)
    return (u[:, :k] * size[:k]) @ v[:k]


def dense_gradient(
    problem: LoRAProblem, replace: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Adapter]:
    """The query adapter's gradient with f = replace(S), rows normalised, in NumPy, float64. O(L^2
    d) beside `replace`.

    c = f V - Y, p = f o (c V^T) - diag(rho) f with rho_i = <c_i, (f V)_i>; dl/dW = beta X_Q^T p K.
    A row sum that is not positive is divided by all the same: such an oracle has failed, and may
    say so.
    """
    q, k, v = (np.asarray(x) for x in projections(problem))
    adapter = problem.adapters["query"]
    beta = float(problem.beta)
    scale = float(problem.scale)
    f = replace(beta * q @ k.T)
    # A stand-in that is no longer positive may divide by nothing.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        f = f / f.sum(1, keepdims=True)
        out = f @ v
        c = out - np.asarray(problem.target)
        rows = beta * (f * (c @ v.T) - (c * out).sum(1)[:, None] * f) @ k
        weight = scale * np.asarray(problem.x_query).T @ rows
    return {"query": Adapter(np.asarray(adapter.b).T @ weight, weight @ np.asarray(adapter.a).T)}
