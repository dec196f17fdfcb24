"""Sections 1 to 3 up to Lemma 3.1: the notation, the tensor trick, the reduced problem."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.gradients.methods import Exact
from lora_limits.gradients.solve import gradient, loss
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.instruments.comparing import softmax
from lora_limits.ledger.row import (
    FULL,
    PARTIAL,
    Evidence,
    Row,
    close,
    exact_gradient,
    problem,
    terms,
)
from lora_limits.problem import Adapter, LoRAProblem, project, reduced_form

IDENTITIES = "tests/gradients/test_exact.py::test_dense_terms_obey_the_identities_of_the_paper"
EXACT = "tests/gradients/test_exact.py::test_dense_and_tiled_equal_the_definitions"
SLOPE = "tests/gradients/test_exact.py::test_the_gradient_is_the_derivative_of_the_loss"
REDUCED = "tests/test_problem.py::test_reduced_form_has_the_same_scores"
TENSOR = "tests/ledger/test_theorems.py::test_the_tensor_trick_needs_row_major_vectors"


def attention() -> Evidence:
    p = problem()
    x = problem().x_query
    q, k, v = (np.asarray(project(p, name, x)) for name in FULL)
    e = np.exp(p.beta * q @ k.T)
    return close(relative(terms(p)["f"] @ v, np.diag(1 / e.sum(1)) @ e @ v))


def lora_update() -> Evidence:
    p = problem()
    a = p.adapters["query"]
    full = p.weights.query + p.scale * a.b @ a.a
    error = relative(project(p, "query", p.x_query), p.x_query @ full)
    rank = int(np.linalg.matrix_rank(full - p.weights.query))
    return Evidence(
        f"relative error {error:.1e}; update has rank {rank} = r", error < 1e-12 and rank == 2
    )


def batch_loss() -> Evidence:
    points = [problem(), dataclasses.replace(problem(), target=2 * problem().target)]
    want = sum(0.5 * ((softmax_output(p) - p.target) ** 2).sum() for p in points)
    return close(abs(sum(float(loss(p)) for p in points) / want - 1))


def softmax_output(p: LoRAProblem) -> np.ndarray:
    """f V from the definition."""
    t = terms(p)
    return softmax(p.beta * t["Q"] @ t["K"].T) @ t["V"]


def surrogates(names: tuple[str, ...], count: int) -> Evidence:
    """ALoRAGC of Problems 1 and 3: the arrays there are, and their sizes: A is r x d, B is d_model
    x r.
    """
    p = problem(FULL)
    grads = {n: g for n, g in gradient(p, Exact()).gradient.items() if n in names}
    fits = all(
        g.a.shape == p.adapters[n].a.shape and g.b.shape == p.adapters[n].b.shape
        for n, g in grads.items()
    )
    shape = grads["query"].a.shape
    return Evidence(
        f"{2 * len(grads)} arrays; dA is r x d = {shape}, not d x r",
        2 * len(grads) == count and fits,
    )


def vectors() -> Evidence:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(4, 3))
    b = rng.normal(size=(5, 2))
    kron = np.kron(a, b)
    blocks = [kron[5 * j : 5 * j + 5] - np.kron(a[j : j + 1], b) for j in range(4)]
    back = a.reshape(-1).reshape(4, 3) - a
    return close(max(np.abs(blocks).max(), np.abs(back).max()), 0.0, "largest difference")


def tensor_trick() -> Evidence:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(4, 3))
    x = rng.normal(size=(3, 2))
    b = rng.normal(size=(5, 2))
    right = relative(np.kron(a, b) @ x.reshape(-1), (a @ x @ b.T).reshape(-1))
    wrong = relative(np.kron(a, b) @ x.reshape(-1, order="F"), (a @ x @ b.T).reshape(-1, order="F"))
    return Evidence(
        f"relative error {right:.1e}; column-major vec: {wrong:.1f}", right < 1e-12 < wrong
    )


def kronecker_terms(p: LoRAProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, f, c) of Definitions 3.2 to 3.5, through the sub-blocks C_j of C1 kron C2 and
    vec(Wbar).
    """
    r = {name: np.asarray(x) for name, x in reduced_form(p).items()}
    lk = r["C2"].shape[0]
    scores = np.kron(r["C1"], r["C2"]) @ r["Wbar"].reshape(-1)
    u = np.stack([np.exp(scores[j * lk : (j + 1) * lk]) for j in range(len(scores) // lk)])
    f = u / u.sum(1, keepdims=True)
    return u, f, f @ r["C3"] - p.target


def tensor_loss() -> Evidence:
    p = problem(PARTIAL)
    _, f, _ = kronecker_terms(p)
    v = np.asarray(reduced_form(p)["C3"])
    total = sum(
        0.5 * (f[j] @ v[:, i] - p.target[j, i]) ** 2
        for j in range(len(f))
        for i in range(v.shape[1])
    )
    return close(abs(float(loss(p)) / total - 1))


def two_cases() -> Evidence:
    """Central differences of the loss in a random direction, in both cases."""
    worst = 0.0
    rng = np.random.default_rng(3)
    for names in (PARTIAL, FULL):
        p = problem(names)
        grads = exact_gradient(p)
        step = {
            n: Adapter(rng.normal(size=a.a.shape), rng.normal(size=a.b.shape))
            for n, a in p.adapters.items()
        }
        slope = sum((grads[n].a * step[n].a).sum() + (grads[n].b * step[n].b).sum() for n in names)
        ends = [loss_at(p, step, size) for size in (1e-5, -1e-5)]
        worst = max(worst, abs((ends[0] - ends[1]) / 2e-5 / slope - 1))
    return close(worst, 1e-6, "against central differences")


def loss_at(p: LoRAProblem, step: dict[str, Adapter], size: float) -> float:
    """The loss with every adapter moved by size * step."""
    moved = {
        n: Adapter(a.a + size * step[n].a, a.b + size * step[n].b) for n, a in p.adapters.items()
    }
    there = dataclasses.replace(p, adapters=moved)
    return float(0.5 * ((softmax_output(there) - p.target) ** 2).sum())


def three_inputs() -> Evidence:
    errors = [relative(softmax_output(p), jax_attention(p)) for p in (problem(), problem(keys=17))]
    return Evidence(f"self {errors[0]:.1e}, cross {errors[1]:.1e}", max(errors) < 1e-12)


def jax_attention(p: LoRAProblem) -> np.ndarray:
    """f V by jax.nn.softmax on the three input sequences."""
    q, k, v = (project(p, n, x) for n, x in zip(FULL, (p.x_query, p.x_key, p.x_value), strict=True))
    return np.asarray(jnp.matmul(jax.nn.softmax(p.beta * jnp.matmul(q, k.T)), v))


def absorbed_constants() -> Evidence:
    p = problem(PARTIAL)
    r = reduced_form(p)
    t = terms(p)
    return close(relative(r["C1"] @ r["Wbar"] @ r["C2"].T, p.beta * t["Q"] @ t["K"].T))


def reduced_gradient() -> Evidence:
    p = problem(PARTIAL)
    r = reduced_form(p)
    kernel = terms(p)["p"]
    adapter = p.adapters["query"]
    want = exact_gradient(p)["query"]
    da = adapter.b.T @ np.asarray(r["C1"]).T @ kernel @ r["C2"]
    db = np.asarray(r["C1"]).T @ kernel @ (r["C2"] @ adapter.a.T)
    return close(max(relative(da, want.a), relative(db, want.b)))


def kronecker_definitions() -> Evidence:
    p = problem(PARTIAL)
    u, f, c = kronecker_terms(p)
    t = terms(p)
    alpha = np.exp(p.beta * t["Q"] @ t["K"].T).sum(1)
    return close(max(relative(f, t["f"]), relative(c, t["c"]), relative(u.sum(1), alpha)))


def row_kernel() -> Evidence:
    """p1, p2 of Definition 3.6 row by row against p1 - p2 = f o (q - rho 1^T), and p 1 = 0."""
    t = terms(problem())
    rows = [np.diag(f) @ q - np.outer(f, f) @ q for f, q in zip(t["f"], t["q"], strict=True)]
    error = relative(np.stack(rows), t["p"])
    zero = float(np.abs(t["p"].sum(1)).max())
    return Evidence(f"relative error {error:.1e}; |p 1| {zero:.1e}", error < 1e-12 and zero < 1e-12)


ROWS = (
    Row(
        "Eq. 1.1",
        "attention is D^-1 exp(beta X W_Q W_K^T X^T) X W_V",
        "definition",
        attention,
        IDENTITIES,
    ),
    Row(
        "Def. 1.1",
        "LoRA: W = W* + s B A, s = alpha / r, only A and B trained",
        "definition",
        lora_update,
        EXACT,
    ),
    Row(
        "Def. 1.2",
        "the loss is half the squared error, summed over data points",
        "definition",
        batch_loss,
        EXACT,
    ),
    Row(
        "Problem 1",
        "ALoRAGC: six surrogate gradients within eps in max norm; printed sizes of A and B are swapped",
        "definition",
        lambda: surrogates(FULL, 6),
        EXACT,
    ),
    Row(
        "Def. 2.1-2.4",
        "row-major vec, its inverse, kron and its j-th block",
        "definition",
        vectors,
        TENSOR,
    ),
    Row(
        "Lemma 2.1", "tensor trick: vec(A X B^T) = (A kron B) vec(X)", "holds", tensor_trick, TENSOR
    ),
    Row(
        "Eq. 2.1", "the loss as a sum over tokens and output columns", "holds", tensor_loss, TENSOR
    ),
    Row(
        "(C1), (C2)",
        "two cases: W_Q and W_V adapted; all three adapted",
        "definition",
        two_cases,
        SLOPE,
    ),
    Row(
        "Def. 2.5, Rem. 2.1",
        "three input sequences; self- and cross-attention",
        "definition",
        three_inputs,
        EXACT,
    ),
    Row(
        "Def. 3.1, (S1)-(S3)",
        "partial adaptation: constants absorbed into C1, C2, C3",
        "holds",
        absorbed_constants,
        REDUCED,
    ),
    Row(
        "Eq. 3.3, Problem 2",
        "the reduced problem and its two surrogates: dA = B^T C1^T p C2, dB = C1^T p C2 A^T",
        "holds as corrected",
        reduced_gradient,
        EXACT,
    ),
    Row(
        "Def. 3.2-3.5",
        "u_j, alpha_j, f_j, c by blocks C_j",
        "definition",
        kronecker_definitions,
        IDENTITIES,
    ),
    Row("Def. 3.6", "p1 and p2, row by row", "definition", row_kernel, IDENTITIES),
    Row(
        "Problem 3",
        "four surrogates: A and B of queries and of keys",
        "definition",
        lambda: surrogates(("query", "key"), 4),
        EXACT,
    ),
)
