"""Exact gradients: Lemmas 3.1, 3.2, C.1 and D.1 to D.4, and what they cost (Theorem F.1)."""

from __future__ import annotations

import dataclasses

import numpy as np

from lora_limits.instruments.comparing import max_error as relative
from lora_limits.ledger.definitions import EXACT, IDENTITIES, TENSOR
from lora_limits.ledger.operations import COUNTED, remark_f_1, theorem_f_1
from lora_limits.ledger.row import (
    PARTIAL,
    Evidence,
    Row,
    close,
    exact_gradient,
    problem,
    terms,
)
from lora_limits.ledger.tensors import kronecker_gradient, transposition
from lora_limits.problem import Adapter, LoRAProblem

TRANSPOSED = "tests/ledger/test_theorems.py::test_the_transposition_is_a_permutation"


def weight_gradients(p: LoRAProblem) -> tuple[np.ndarray, np.ndarray]:
    """(dl/dW_Q, dl/dW_K) = (beta X_Q^T p K, beta X_K^T p^T Q)."""
    t = terms(p)
    query = p.beta * p.x_query.T @ t["p"] @ t["K"]
    key = p.beta * p.x_key.T @ t["p"].T @ t["Q"]
    return query, key


def lemma_3_1() -> Evidence:
    """The Kronecker form against beta X_Q^T p K."""
    p = problem(length=8)
    t = terms(p)
    literal = kronecker_gradient(p.x_query, p.beta * t["K"], t)
    return close(relative(literal, weight_gradients(p)[0]))


def lemma_3_2() -> Evidence:
    """Corrected: q = c C3^T. p = p1 - p2 of it, and both gradients through p."""
    p = problem(PARTIAL)
    t = terms(p)
    a = p.adapters["query"]
    want = exact_gradient(p)["query"]
    q = t["c"] @ t["V"].T
    p1 = t["f"] * q
    p2 = np.diag(p1.sum(1)) @ t["f"]
    c1 = p.scale * p.x_query
    c2 = p.beta * t["K"]
    da = a.b.T @ c1.T @ (p1 - p2) @ c2
    db = c1.T @ (p1 - p2) @ c2 @ a.a.T
    return close(max(relative(da, want.a), relative(db, want.b)))


def lemma_c_1() -> Evidence:
    """J_B and J_A formed: W in each adapter, and the gradients by the chain rule."""
    p = problem()
    a = p.adapters["query"]
    want = exact_gradient(p)["query"]
    dw = weight_gradients(p)[0].reshape(-1)
    (r, d), dm = a.a.shape, a.b.shape[0]
    # d vec W / d vec A and d vec W / d vec B
    j_b = p.scale * np.kron(a.b, np.eye(d))
    j_a = p.scale * np.kron(np.eye(dm), a.a.T)
    update = (p.scale * a.b @ a.a).reshape(-1)
    errors = (
        relative(j_b @ a.a.reshape(-1), update),
        relative(j_a @ a.b.reshape(-1), update),
        relative((j_b.T @ dw).reshape(r, d), want.a),
        relative((j_a.T @ dw).reshape(dm, r), want.b),
    )
    return close(max(errors))


def full_definitions() -> Evidence:
    """C_Q1 = X_Q, C_Q2 = X_K W_K and C_K1 = Q, C_K2 = X_K give the same scores.

    Hence the same u, alpha, f, c, q, p; and A_Q does not move C_Q2.
    """
    p = problem()
    t = terms(p)
    query, key = p.adapters["query"], p.adapters["key"]
    w_query = p.weights.query + p.scale * query.b @ query.a
    w_key = p.weights.key + p.scale * key.b @ key.a
    want = t["Q"] @ t["K"].T
    by_query = p.x_query @ w_query @ t["K"].T
    by_key = t["Q"] @ w_key.T @ p.x_key.T
    error = max(relative(by_query, want), relative(by_key, want))
    # C_Q2 = K must not move with the query adapter: the pair is constant in it.
    tripled = p.adapters | {"query": Adapter(3 * query.a, query.b)}
    moved = dataclasses.replace(p, adapters=tripled)
    change = relative(terms(moved)["K"], t["K"])
    measured = f"relative error {error:.1e}; C_Q2 moves by {change:.0e} with A_Q"
    return Evidence(measured, error < 1e-12 and change == 0)


def lemma_d_1() -> Evidence:
    """The Kronecker form of both sides; that of the keys is of W_K^T."""
    p = problem(length=8, keys=6)
    t = terms(p)
    dq, dk = weight_gradients(p)
    query = kronecker_gradient(p.x_query, p.beta * t["K"], t)
    key_transposed = kronecker_gradient(t["Q"], p.beta * p.x_key, t)
    return close(max(relative(query, dq), relative(key_transposed, dk.T)))


def lemma_d_2() -> Evidence:
    """T vec(W) = vec(W^T), T with a one in each row and column."""
    w = np.random.default_rng(4).normal(size=(5, 3))
    t = transposition(5, 3)
    error = float(np.abs(t @ w.reshape(-1) - w.T.reshape(-1)).max())
    measured = f"difference {error:.0e}; {int(t.sum())} ones in {t.size} entries"
    return Evidence(measured, error == 0 and t.sum() == 15)


def lemma_d_3() -> Evidence:
    """vec(dA_K) = J_B^T T^T vec(dl/dW_K^T), and so for B_K."""
    p = problem()
    a = p.adapters["key"]
    want = exact_gradient(p)["key"]
    dk = weight_gradients(p)[1]
    dm, d = dk.shape
    # the gradient in W_K from that in W_K^T, which Lemma D.1 gives
    back = transposition(dm, d).T @ dk.T.reshape(-1)
    da = p.scale * np.kron(a.b, np.eye(d)).T @ back
    db = p.scale * np.kron(np.eye(dm), a.a.T).T @ back
    return close(max(relative(da, want.a.reshape(-1)), relative(db, want.b.reshape(-1))))


def lemma_d_4() -> Evidence:
    """Corrected: dA_K = s B_K^T C_K2^T p^T C_K1, dB_K alike; and those of the queries."""
    p = problem()
    t = terms(p)
    want = exact_gradient(p)
    q = p.adapters["query"]
    k = p.adapters["key"]
    # s dl/dW of both
    left = p.scale * p.beta * p.x_query.T @ t["p"] @ t["K"]
    right = p.scale * p.beta * p.x_key.T @ t["p"].T @ t["Q"]
    pairs = ((q.b.T @ left, want["query"].a), (left @ q.a.T, want["query"].b))
    pairs += ((k.b.T @ right, want["key"].a), (right @ k.a.T, want["key"].b))
    return close(max(relative(got, wanted) for got, wanted in pairs))


ROWS = (
    Row(
        "Lemma 3.1",
        "dl/dvec W = sum_j C_j^T (diag f_j - f_j f_j^T) q_j",
        "holds",
        lemma_3_1,
        TENSOR,
    ),
    Row(
        "Lemma 3.2",
        "dA = B^T C1^T p C2, dB = C1^T p C2 A^T, q = c C3^T",
        "holds as corrected",
        lemma_3_2,
        EXACT,
    ),
    Row("Rem. 3.2", "exact computation is quadratic in L", "holds", theorem_f_1, COUNTED, "rates"),
    Row(
        "Def. A.1, Eq. A.1, A.2",
        "full adaptation: C_Q1 to C_K2, C3",
        "definition",
        full_definitions,
        IDENTITIES,
    ),
    Row(
        "Rem. A.1",
        "each pair is constant in the other adapter",
        "holds",
        full_definitions,
        IDENTITIES,
    ),
    Row(
        "Lemma C.1",
        "vec W = vec W* + J_B vec A = vec W* + J_A vec B, and gradients",
        "holds",
        lemma_c_1,
        TENSOR,
    ),
    Row(
        "Def. D.1-D.8",
        "u, alpha, f, c, q, p1, p2, p for Q and K",
        "definition",
        full_definitions,
        IDENTITIES,
    ),
    Row("Lemma D.1", "Lemma 3.1 for W_Q and for W_K^T", "holds", lemma_d_1, TENSOR),
    Row("Lemma D.2", "vec(W^T) = T vec(W), T a permutation", "holds", lemma_d_2, TRANSPOSED),
    Row(
        "Lemma D.3",
        "the four adapter gradients through J_A, J_B and T",
        "holds",
        lemma_d_3,
        TRANSPOSED,
    ),
    Row(
        "Lemma D.4",
        "the same through p; dA_K = s B_K^T C_K2^T p^T C_K1",
        "holds as corrected",
        lemma_d_4,
        EXACT,
    ),
    Row(
        "Rem. F.1",
        "read literally L^3; diagonal plus rank one makes it L^2",
        "holds",
        remark_f_1,
        COUNTED,
        "rates",
    ),
    Row(
        "Theorem F.1",
        "exact adapter gradients in O(L^2 d + L d^2)",
        "holds",
        theorem_f_1,
        COUNTED,
        "rates",
    ),
)
