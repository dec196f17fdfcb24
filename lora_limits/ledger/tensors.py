"""Kronecker forms, formed literally: vec, the tensor trick, the blocks C_j, the transposition."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_limits.gradients.solve import loss
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.ledger.row import PARTIAL, Evidence, close, problem, terms
from lora_limits.problem import LoRAProblem, reduced_form


def vectors() -> Evidence:
    """The blocks of a Kronecker product are those of Definition 2.4, and vec has an inverse."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(4, 3))
    b = rng.normal(size=(5, 2))
    kron = np.kron(a, b)
    blocks = [kron[5 * j : 5 * j + 5] - np.kron(a[j : j + 1], b) for j in range(4)]
    back = a.reshape(-1).reshape(4, 3) - a
    return close(max(np.abs(blocks).max(), np.abs(back).max()), 0.0, "largest difference")


def tensor_trick() -> Evidence:
    """Lemma 2.1 with row-major vectors, and how far off column-major ones are."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=(4, 3))
    x = rng.normal(size=(3, 2))
    b = rng.normal(size=(5, 2))
    kron = np.kron(a, b)
    want = a @ x @ b.T
    right = relative(kron @ x.reshape(-1), want.reshape(-1))
    wrong = relative(kron @ x.reshape(-1, order="F"), want.reshape(-1, order="F"))
    measured = f"relative error {right:.1e}; column-major vec: {wrong:.1f}"
    return Evidence(measured, right < 1e-12 < wrong)


def kronecker_terms(p: LoRAProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, f, c) of Definitions 3.2 to 3.5, through the blocks C_j of C1 kron C2 and vec(Wbar)."""
    r = {name: np.asarray(x) for name, x in reduced_form(p).items()}
    lk = r["C2"].shape[0]
    scores = np.kron(r["C1"], r["C2"]) @ r["Wbar"].reshape(-1)
    # u_j = exp(C_j vec(Wbar)), a block of lk scores for each query
    u = np.exp(scores.reshape(-1, lk))
    f = u / u.sum(1, keepdims=True)
    return u, f, f @ r["C3"] - p.target


def tensor_loss() -> Evidence:
    """The library's loss against Equation 2.1, one token and one output column at a time."""
    p = problem(PARTIAL)
    _, f, _ = kronecker_terms(p)
    v = np.asarray(reduced_form(p)["C3"])
    total = 0.0
    for j in range(len(f)):
        for i in range(v.shape[1]):
            total += 0.5 * (f[j] @ v[:, i] - p.target[j, i]) ** 2
    return close(abs(float(loss(p)) / total - 1))


def kronecker_definitions() -> Evidence:
    """u, f and c by blocks C_j against the library's, alpha as the row sums of u."""
    p = problem(PARTIAL)
    u, f, c = kronecker_terms(p)
    t = terms(p)
    alpha = np.exp(p.beta * t["Q"] @ t["K"].T).sum(1)
    return close(max(relative(f, t["f"]), relative(c, t["c"]), relative(u.sum(1), alpha)))


def kronecker_gradient(c1: Any, c2: Any, t: dict[str, np.ndarray]) -> np.ndarray:
    """Lemma 3.1: sum_j C_j^T (diag f_j - f_j f_j^T) q_j, reshaped to W. O(Lq Lk^2 d^2)."""
    blocks = np.kron(c1, c2).reshape(len(c1), len(c2), -1)
    rows = zip(blocks, t["f"], t["q"], strict=True)
    parts = [c.T @ (np.diag(f) - np.outer(f, f)) @ q for c, f, q in rows]
    return np.sum(parts, axis=0).reshape(c1.shape[1], -1)


def transposition(rows: int, columns: int) -> np.ndarray:
    """T with vec(W^T) = T vec(W) for W of this size, row-major: one 1 in each row and column."""
    order = np.arange(rows * columns).reshape(rows, columns).T.reshape(-1)
    return np.eye(rows * columns)[order]
