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
from lora_limits.ledger import tensors
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
from lora_limits.problem import Adapter, LoRAProblem, project, projections, reduced_form

IDENTITIES = "tests/gradients/test_exact.py::test_dense_terms_obey_the_identities_of_the_paper"
EXACT = "tests/gradients/test_exact.py::test_dense_and_tiled_equal_the_definitions"
SLOPE = "tests/gradients/test_exact.py::test_the_gradient_is_the_derivative_of_the_loss"
REDUCED = "tests/test_problem.py::test_reduced_form_has_the_same_scores"
TENSOR = "tests/ledger/test_theorems.py::test_the_tensor_trick_needs_row_major_vectors"


def attention() -> Evidence:
    """The library's f V against the formula, D^-1 formed."""
    p = problem()
    q, k, v = (np.asarray(project(p, name, p.x_query)) for name in FULL)
    e = np.exp(p.beta * q @ k.T)
    d_inverse = np.diag(1 / e.sum(1))
    return close(relative(terms(p)["f"] @ v, d_inverse @ e @ v))


def lora_update() -> Evidence:
    """The projection that never forms B A against the one that does."""
    p = problem()
    a = p.adapters["query"]
    full = p.weights.query + p.scale * a.b @ a.a
    error = relative(project(p, "query", p.x_query), p.x_query @ full)
    rank = int(np.linalg.matrix_rank(full - p.weights.query))
    measured = f"relative error {error:.1e}; update has rank {rank} = r"
    return Evidence(measured, error < 1e-12 and rank == 2)


def batch_loss() -> Evidence:
    """The library's loss of two data points against the definition."""
    points = [problem(), dataclasses.replace(problem(), target=2 * problem().target)]
    want = sum(0.5 * ((softmax_output(p) - p.target) ** 2).sum() for p in points)
    got = sum(float(loss(p)) for p in points)
    return close(abs(got / want - 1))


def softmax_output(p: LoRAProblem) -> np.ndarray:
    """f V from the definition."""
    t = terms(p)
    return softmax(p.beta * t["Q"] @ t["K"].T) @ t["V"]


def surrogates(names: tuple[str, ...], count: int) -> Evidence:
    """ALoRAGC of Problems 1 and 3: as many arrays as asked for, A of r x d and B of d_model x r."""
    p = problem(FULL)
    grads = {n: g for n, g in gradient(p, Exact()).gradient.items() if n in names}
    got = {n: (g.a.shape, g.b.shape) for n, g in grads.items()}
    want = {n: (p.adapters[n].a.shape, p.adapters[n].b.shape) for n in grads}
    arrays = 2 * len(grads)
    measured = f"{arrays} arrays; dA is r x d = {grads['query'].a.shape}, not d x r"
    return Evidence(measured, arrays == count and got == want)


def two_cases() -> Evidence:
    """Central differences of the loss in a random direction, in both cases."""
    worst = 0.0
    rng = np.random.default_rng(3)
    for names in (PARTIAL, FULL):
        p = problem(names)
        grads = exact_gradient(p)
        step = {}
        for n, a in p.adapters.items():
            step[n] = Adapter(rng.normal(size=a.a.shape), rng.normal(size=a.b.shape))
        slope = sum((grads[n].a * step[n].a).sum() + (grads[n].b * step[n].b).sum() for n in names)
        ahead, behind = (loss_at(p, step, size) for size in (1e-5, -1e-5))
        difference = (ahead - behind) / 2e-5
        worst = max(worst, abs(difference / slope - 1))
    return close(worst, 1e-6, "against central differences")


def loss_at(p: LoRAProblem, step: dict[str, Adapter], size: float) -> float:
    """The loss with every adapter moved by size * step."""
    moved = jax.tree.map(lambda x, way: x + size * way, p.adapters, step)
    there = dataclasses.replace(p, adapters=moved)
    return float(0.5 * ((softmax_output(there) - p.target) ** 2).sum())


def three_inputs() -> Evidence:
    """Self-attention, and cross-attention with 17 keys, against JAX's own softmax."""
    errors = [relative(softmax_output(p), jax_attention(p)) for p in (problem(), problem(keys=17))]
    return Evidence(f"self {errors[0]:.1e}, cross {errors[1]:.1e}", max(errors) < 1e-12)


def jax_attention(p: LoRAProblem) -> np.ndarray:
    """f V by jax.nn.softmax on the three input sequences."""
    q, k, v = projections(p)
    f = jax.nn.softmax(p.beta * jnp.matmul(q, k.T))
    return np.asarray(jnp.matmul(f, v))


def absorbed_constants() -> Evidence:
    """C1 Wbar C2^T against beta Q K^T."""
    p = problem(PARTIAL)
    r = reduced_form(p)
    t = terms(p)
    return close(relative(r["C1"] @ r["Wbar"] @ r["C2"].T, p.beta * t["Q"] @ t["K"].T))


def reduced_gradient() -> Evidence:
    """dA = B^T C1^T p C2 and dB = C1^T p C2 A^T."""
    p = problem(PARTIAL)
    r = reduced_form(p)
    kernel = terms(p)["p"]
    adapter = p.adapters["query"]
    want = exact_gradient(p)["query"]
    da = adapter.b.T @ np.asarray(r["C1"]).T @ kernel @ r["C2"]
    db = np.asarray(r["C1"]).T @ kernel @ (r["C2"] @ adapter.a.T)
    return close(max(relative(da, want.a), relative(db, want.b)))


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
        tensors.vectors,
        TENSOR,
    ),
    Row(
        "Lemma 2.1",
        "tensor trick: vec(A X B^T) = (A kron B) vec(X)",
        "holds",
        tensors.tensor_trick,
        TENSOR,
    ),
    Row(
        "Eq. 2.1",
        "the loss as a sum over tokens and output columns",
        "holds",
        tensors.tensor_loss,
        TENSOR,
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
        tensors.kronecker_definitions,
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
