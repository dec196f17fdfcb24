"""Exact gradients: Lemmas 3.1, 3.2, C.1 and D.1 to D.4, and what they cost (Theorem F.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.gradients import chain, exact
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.ledger.definitions import EXACT, IDENTITIES, TENSOR
from lora_limits.ledger.row import (
    PARTIAL,
    Evidence,
    Row,
    close,
    exact_gradient,
    problem,
    terms,
)
from lora_limits.problem import Adapter, LoRAProblem

COUNTED = "tests/ledger/test_theorems.py::test_operations_grow_as_counted"
TRANSPOSED = "tests/ledger/test_theorems.py::test_the_transposition_is_a_permutation"


def kronecker_gradient(c1: Any, c2: Any, t: dict[str, np.ndarray]) -> np.ndarray:
    """Lemma 3.1: sum_j C_j^T (diag f_j - f_j f_j^T) q_j, formed literally; reshaped to W. O(Lq Lk^2
    d^2).
    """
    blocks = np.kron(c1, c2).reshape(len(c1), len(c2), -1)
    rows = zip(blocks, t["f"], t["q"], strict=True)
    parts = [c.T @ (np.diag(f) - np.outer(f, f)) @ q for c, f, q in rows]
    return np.sum(parts, axis=0).reshape(c1.shape[1], -1)


def weight_gradients(p: LoRAProblem) -> tuple[np.ndarray, np.ndarray]:
    """(dl/dW_Q, dl/dW_K) = (beta X_Q^T p K, beta X_K^T p^T Q)."""
    t = terms(p)
    return p.beta * p.x_query.T @ t["p"] @ t["K"], p.beta * p.x_key.T @ t["p"].T @ t["Q"]


def lemma_3_1() -> Evidence:
    p = problem(length=8)
    t = terms(p)
    return close(
        relative(kronecker_gradient(p.x_query, p.beta * t["K"], t), weight_gradients(p)[0])
    )


def lemma_3_2() -> Evidence:
    p = problem(PARTIAL)
    t = terms(p)
    a = p.adapters["query"]
    want = exact_gradient(p)["query"]
    q = t["c"] @ t["V"].T
    kernel = t["f"] * q - np.diag((t["f"] * q).sum(1)) @ t["f"]
    c1 = p.scale * p.x_query
    c2 = p.beta * t["K"]
    return close(
        max(
            relative(a.b.T @ c1.T @ kernel @ c2, want.a),
            relative(c1.T @ kernel @ c2 @ a.a.T, want.b),
        )
    )


def lemma_c_1() -> Evidence:
    p = problem()
    a = p.adapters["query"]
    want = exact_gradient(p)["query"]
    dw = weight_gradients(p)[0].reshape(-1)
    (r, d), dm = a.a.shape, a.b.shape[0]
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
    """C_Q1 = X_Q, C_Q2 = X_K W_K and C_K1 = Q, C_K2 = X_K give the same scores, hence the same u,
    alpha, f, c, q, p.
    """
    p = problem()
    t = terms(p)
    w = {
        n: getattr(p.weights, n) + p.scale * p.adapters[n].b @ p.adapters[n].a
        for n in ("query", "key")
    }
    want = t["Q"] @ t["K"].T
    error = max(
        relative(p.x_query @ w["query"] @ t["K"].T, want),
        relative(t["Q"] @ w["key"].T @ p.x_key.T, want),
    )
    adapter = p.adapters["query"]
    moved = dataclasses.replace(
        p, adapters=p.adapters | {"query": Adapter(3 * adapter.a, adapter.b)}
    )
    change = relative(terms(moved)["K"], t["K"])
    return Evidence(
        f"relative error {error:.1e}; C_Q2 moves by {change:.0e} with A_Q",
        error < 1e-12 and change == 0,
    )


def lemma_d_1() -> Evidence:
    p = problem(length=8, keys=6)
    t = terms(p)
    dq, dk = weight_gradients(p)
    query = kronecker_gradient(p.x_query, p.beta * t["K"], t)
    key_transposed = kronecker_gradient(t["Q"], p.beta * p.x_key, t)
    return close(max(relative(query, dq), relative(key_transposed, dk.T)))


def transposition(rows: int, columns: int) -> np.ndarray:
    """T with vec(W^T) = T vec(W) for W of this size, row-major: one 1 in each row and column."""
    order = np.arange(rows * columns).reshape(rows, columns).T.reshape(-1)
    return np.eye(rows * columns)[order]


def lemma_d_2() -> Evidence:
    w = np.random.default_rng(4).normal(size=(5, 3))
    t = transposition(5, 3)
    error = float(np.abs(t @ w.reshape(-1) - w.T.reshape(-1)).max())
    return Evidence(
        f"difference {error:.0e}; {int(t.sum())} ones in {t.size} entries",
        error == 0 and t.sum() == 15,
    )


def lemma_d_3() -> Evidence:
    """vec(dA_K) = J_B^T T^T vec(dl/dW_K^T), and so for B_K."""
    p = problem()
    a = p.adapters["key"]
    want = exact_gradient(p)["key"]
    dk = weight_gradients(p)[1]
    dm, d = dk.shape
    back = transposition(dm, d).T @ dk.T.reshape(-1)
    da = p.scale * np.kron(a.b, np.eye(d)).T @ back
    db = p.scale * np.kron(np.eye(dm), a.a.T).T @ back
    return close(max(relative(da, want.a.reshape(-1)), relative(db, want.b.reshape(-1))))


def lemma_d_4() -> Evidence:
    p = problem()
    t = terms(p)
    want = exact_gradient(p)
    q = p.adapters["query"]
    k = p.adapters["key"]
    left = p.scale * p.beta * p.x_query.T @ t["p"] @ t["K"]
    right = p.scale * p.beta * p.x_key.T @ t["p"].T @ t["Q"]
    pairs = ((q.b.T @ left, want["query"].a), (left @ q.a.T, want["query"].b))
    pairs += ((k.b.T @ right, want["key"].a), (right @ k.a.T, want["key"].b))
    return close(max(relative(got, wanted) for got, wanted in pairs))


def operations(function: Callable[..., Any], *args: Any) -> float:
    """Arithmetic operations of a function without loops, from its lowered form; nothing is run."""
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return float(analysis["flops"])  # pyright: ignore[reportOptionalSubscript, reportArgumentType]


def exponent(function: Callable[[int], float], length: int = 512) -> float:
    """Local exponent of a count in L, between L and 2 L."""
    return math.log2(function(2 * length) / function(length))


def abstract(length: int) -> LoRAProblem:
    """A problem of this length without numbers in it."""
    shapes = jax.tree.map(np.asarray, problem(square=True))
    tokens = problem(square=True).x_query.shape[0]

    def grown(x: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(length if n == tokens else n for n in x.shape), x.dtype)

    return jax.tree.map(grown, shapes)


def naive_operations(length: int) -> float:
    """Lemma 3.1 read literally: the L x L matrix diag f_j - f_j f_j^T of every token times C_j."""

    def literal(c1, c2, f, q):
        blocks = c1[:, None, :, None] * c2[None, :, None, :]
        blocks = blocks.reshape(length, length, -1)
        middle = jax.vmap(lambda row: jnp.diag(row) - jnp.outer(row, row))(f)
        return jnp.einsum("jac,jab,jb->c", blocks, middle, q, optimize=[(0, 1), (0, 1)])

    tall, square = (jax.ShapeDtypeStruct((length, n), np.float64) for n in (4, length))
    return operations(literal, tall, tall, square, square)


def dense_operations(length: int) -> float:
    """The quadratic algorithm: dense f, q and p = p1 - p2."""
    return operations(exact.dense_gradient, abstract(length))


def chain_operations(length: int, width: int = 15) -> float:
    """The chain from a factor of fixed width."""
    factor = jax.ShapeDtypeStruct((length, width), np.float64)
    return operations(chain.chain_gradient, abstract(length), factor, factor)


def remark_f_1() -> Evidence:
    cubic = exponent(naive_operations, 128)
    square = exponent(dense_operations)
    return Evidence(
        f"operations ~ L^{cubic:.2f} literal, L^{square:.2f} reduced",
        cubic > 2.9 and 1.9 < square < 2.1,
    )


def theorem_f_1() -> Evidence:
    square = exponent(dense_operations)
    ratio = dense_operations(1024) / 1024**2
    return Evidence(
        f"{ratio:.0f} L^2 operations at d = 4, exponent {square:.2f}", 1.9 < square < 2.1
    )


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
