"""Hardness: Lemma 1.1, Hypothesis 1, Theorem 4.1, Appendix E, run through a gradient oracle."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits import hardness
from lora_limits.hardness import gadgets, instances, quadrature
from lora_limits.hardness.deciders import PATH_GAP, PATH_SLACK, path_problem
from lora_limits.instruments.comparing import max_error as relative
from lora_limits.instruments.comparing import softmax
from lora_limits.ledger.row import Evidence, Row, close, exact_gradient, problem
from lora_limits.polynomial import needed
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem

DECIDES = "tests/hardness/test_hardness.py::test_orthogonal_vectors"
EMBEDS = "tests/ledger/test_theorems.py::test_attention_in_x_is_a_lora_problem"
POINTS, WIDTH, DISTANCE, GAP = 32, 30, 2, 3
# d = Theta(log n), as the theorem wants it
VECTORS, ORTHOGONAL_WIDTH = 256, 32


def tau(
    gadget: gadgets.Gadget, lam: float = 1.0, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(f v, d/dlambda f v) on the rows of the gadget, with scores lambda S: one forward pass.

    strength: of the scores that the gadget needs, which share it is built for.
    """
    needed_noise = gadgets.inverse_noise(gadget, PATH_SLACK)
    queries, keys, v = gadgets.token_rows(gadget, strength * needed_noise, 0.0)
    s = queries @ keys.T / gadget.width
    f = softmax(lam * s)
    out = f @ v
    # the covariance under f of a row's scores and v
    slope = (f * s) @ v - out * (f * s).sum(1)
    return out, slope


def neighbours(answer: bool, clustered: bool = True) -> gadgets.Gadget:
    """A gap nearest-neighbour instance whose answer is known."""
    rng = np.random.default_rng([5, answer])
    maker = instances.clustered_neighbours if clustered else instances.random_neighbours
    a, b = maker(rng, POINTS, WIDTH, DISTANCE, GAP, answer)
    return hardness.hamming_gadget(a, b, DISTANCE, GAP)


def forward() -> Evidence:
    """Entries of the attention output alone tell YES from NO, at scores of Theta(log L)."""
    yes, no = (float((tau(neighbours(answer))[0][:POINTS] ** 2).sum()) for answer in (True, False))
    measured = f"sum tau^2: YES {yes:.3f} >= 1/4, NO {no:.3f} <= 1/8"
    return Evidence(measured, yes >= 0.25 and no <= 0.125 + 1e-12)


def hypothesis() -> Evidence:
    """Assumed, not tested: what is run is the reduction from k-SAT, through 2^{N/2} vectors."""
    oracle = hardness.gradient_oracle()
    yes = [[1, 2], [-1, 3], [-2, -3]]
    no = [[1, 2], [-1, 2], [1, -2], [-1, -2, 3], [-3, -2, -1]]
    answers = [bool(hardness.satisfiable(clauses, oracle)) for clauses in (yes, no)]
    return Evidence(f"assumed; 2 formulas through gradients: {answers}", answers == [True, False])


def transition() -> Evidence:
    """A slope, and what is hard above it: exponents counted over Gamma = kappa sqrt(ln L), and the
    gap between YES and NO, which opens with the scores.

    log k / log L at L = 2^32, d = log2 L, tolerance 1/L, beta = 1/d, so that R = kappa^2 ln L.
    """
    # Counting touches no token, so L may be far beyond what a computer holds.
    log_length = 32 * math.log(2)
    out = {}
    for kappa in (0.125, 0.25, 1.0):
        degree = needed.degree_needed(kappa**2 * log_length, 2.0**-32)
        out[kappa] = needed.width_exponent(32, degree, log_length)
    gaps = {}
    for strength in (0.25, 1.0):
        # of YES the instance with one pair, of NO the one with most at the gap's other end
        yes, no = (
            float((tau(neighbours(answer, not answer), strength=strength)[0][:POINTS] ** 2).sum())
            for answer in (True, False)
        )
        gaps[strength] = yes - no
    text = ", ".join(f"{value:.2f} at kappa = {kappa}" for kappa, value in out.items())
    text = f"log k / log L, counted to 2^32: {text}; sum tau^2, YES less NO: "
    text += f"{gaps[0.25]:.2f} at a quarter of the scores, {gaps[1.0]:.2f} at all"
    rising = out[0.125] < 1 < out[0.25] < out[1.0]
    return Evidence(text, rising and gaps[0.25] < 0 and gaps[1.0] >= PATH_GAP)


def theorem_4_1() -> Evidence:
    """Orthogonal vectors, half of them planted, decided by gradients alone."""
    oracle = hardness.gradient_oracle()
    right = 0
    calls = 0
    for trial in range(4):
        rng = np.random.default_rng([6, trial])
        a, b = instances.random_orthogonality(rng, VECTORS, ORTHOGONAL_WIDTH, trial % 2 == 0)
        decision = hardness.orthogonal_vectors(a, b, oracle)
        right += bool(decision) == instances.has_orthogonal_pair(a, b)
        calls += decision.calls
    measured = (
        f"{VECTORS} vectors of {ORTHOGONAL_WIDTH} bits, L = {2 * VECTORS}, through gradients: "
    )
    measured += f"{right} of 4 right, {calls} calls"
    return Evidence(measured, right == 4)


def lemma_e_1() -> Evidence:
    """The published quadrature on log^4 n nodes and Gauss-Legendre on 24, on exact derivatives."""
    gadget = neighbours(False, clustered=False)
    exact = float((tau(gadget)[0] ** 2).sum() - (tau(gadget, 0.0)[0] ** 2).sum())

    def slope(lam: float) -> float:
        out, change = tau(gadget, lam)
        return 2 * float(out @ change)

    # As many nodes as published, and as few as suffice when they are well placed.
    left = abs(quadrature.left_riemann(slope, round(math.log(POINTS) ** 4)) - exact)
    gauss = abs(quadrature.gauss_legendre(slope, 24) - exact)
    text = f"error: left Riemann {left:.2f}, Gauss-Legendre {gauss:.0e}; {PATH_GAP:.3f} is allowed"
    return Evidence(text, left > PATH_GAP > 1e4 * gauss)


def attention_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A1, A2, A3 (L x r), X (r x r) and E (L x r) of AAttLGC."""
    rng = np.random.default_rng(8)
    a1, a2, a3, e = (rng.normal(size=(20, 3)) for _ in range(4))
    return a1, a2, a3, rng.normal(size=(3, 3)), e


def attention_gradient() -> np.ndarray:
    """Definition E.1, by automatic differentiation.

    The gradient of 1/2 || D^-1 exp(A1 X A2^T / r) A3 - E ||^2 in X (r x r).
    """
    a1, a2, a3, x, e = attention_problem()

    def value(x: jax.Array) -> jax.Array:
        f = jax.nn.softmax(jnp.matmul(jnp.matmul(a1, x), a2.T) / 3, axis=-1)
        return 0.5 * ((jnp.matmul(f, a3) - e) ** 2).sum()

    return np.asarray(jax.grad(value)(jnp.asarray(x)))


def definition_e_1() -> Evidence:
    """The same gradient by hand, A1^T p A2 / r."""
    a1, a2, a3, x, e = attention_problem()
    f = softmax(a1 @ x @ a2.T / 3)
    q = (f @ a3 - e) @ a3.T
    p = f * (q - (f * q).sum(1, keepdims=True))
    return close(relative(a1.T @ p @ a2 / 3, attention_gradient()))


def embedding() -> Evidence:
    """The first r columns of dl/dA of a LoRA problem are that gradient.

    C1 B = A1, A = [X, 0], C2 = [A2, 0] / r, C3 = A3 and W*_Q = 0.
    """
    a1, a2, a3, x, e = attention_problem()
    # A last coordinate of zeros: B is (4, 3), so that A = [X, 0] is (3, 4).
    no = np.zeros((20, 1))
    eye = np.eye(4)
    weights = AttentionWeights(np.zeros((4, 4)), eye, eye[:, :3])
    adapter = Adapter(np.pad(x, ((0, 0), (0, 1))), eye[:, :3])
    xq, xk, xv = (np.concatenate([a, no], 1) for a in (a1, a2, a3))
    p = LoRAProblem(
        xq, xk, xv, e, weights=weights, adapters={"query": adapter}, scale=1.0, beta=1 / 3
    )
    return close(relative(exact_gradient(p)["query"].a[:, :3], attention_gradient()))


def free_weight() -> Evidence:
    """The path of the reduction starts at uniform attention: true for W*_Q = 0, not for another.

    The theorem speaks of the worst W*_Q, and 0 is one that it allows.
    """
    gadget = neighbours(False)
    p = path_problem(gadget, gadgets.inverse_noise(gadget, PATH_SLACK), 0.0)
    # F(0) of uniform attention, which the reduction subtracts
    uniform = gadget.tokens * (POINTS / gadget.tokens) ** 2
    out = []
    x_query, x_key, x_value = (np.asarray(x) for x in (p.x_query, p.x_key, p.x_value))
    zero, key, value = (np.asarray(w) for w in jax.tree.leaves(p.weights))
    for query in (zero, np.eye(len(zero))):
        scores = p.beta * x_query @ query @ (x_key @ key).T
        output = softmax(scores) @ x_value @ value
        out.append(abs(float((output**2).sum()) - uniform))
    text = f"F(0) off by {out[0]:.0e} at W*_Q = 0, by {out[1]:.2f} at W*_Q = I; "
    text += f"{PATH_GAP:.3f} is allowed"
    return Evidence(text, out[0] < 1e-12 and out[1] > PATH_GAP)


def mini_batch() -> Evidence:
    """The gradient of a batch is the sum over its data points: one of them is already as hard."""
    points = [problem(), problem(gamma=2.0)]
    query = points[0].adapters["query"]
    # Both points with the query adapter of the first.
    shared = [dataclasses.replace(p, adapters=p.adapters | {"query": query}) for p in points]

    def total(a: jax.Array) -> jax.Array:
        loss = jnp.zeros(())
        for p in shared:
            of_keys, of_values = p.adapters["key"], p.adapters["value"]
            w_query = p.weights.query + p.scale * jnp.matmul(query.b, a)
            w_key = p.weights.key + p.scale * of_keys.b @ of_keys.a
            w_value = p.weights.value + p.scale * of_values.b @ of_values.a
            q = jnp.matmul(p.x_query, w_query)
            f = jax.nn.softmax(p.beta * jnp.matmul(q, (p.x_key @ w_key).T), axis=-1)
            loss = loss + 0.5 * ((jnp.matmul(f, p.x_value @ w_value) - p.target) ** 2).sum()
        return loss

    got = jax.grad(total)(jnp.asarray(query.a))
    return close(relative(sum(exact_gradient(p)["query"].a for p in shared), got))


SETH = "conditional on SETH"
ROWS = (
    Row(
        "Lemma 1.1",
        "forward attention is subquadratic only below Theta(sqrt(log L))",
        SETH,
        forward,
        DECIDES,
        "hardness",
    ),
    Row(
        "Hypothesis 1",
        "SETH: for every eps some k-SAT is not in 2^{(1-eps) n}",
        "assumption",
        hypothesis,
        "tests/hardness/test_hardness.py::test_random_3sat_of_12_variables",
    ),
    Row(
        "Theorem 4.1",
        "above sqrt(log L), no L^{2-delta} gradient",
        SETH,
        theorem_4_1,
        DECIDES,
        "hardness",
    ),
    Row(
        "Rem. 4.1",
        "a phase transition in Gamma at sqrt(log L); measured: a slope, and hard above it under SETH",
        "holds as corrected",
        transition,
        "tests/ledger/test_theorems.py::test_the_exponent_crosses_over_at_sqrt_log_length",
        "phase_boundary",
    ),
    Row("Theorem 1.1", "informal Theorem 4.1", SETH, theorem_4_1, DECIDES, "hardness"),
    Row(
        "Def. E.1", "AAttLGC: the gradient of attention in X", "definition", definition_e_1, EMBEDS
    ),
    Row(
        "Lemma E.1",
        "AAttLGC is hard; its published quadrature misses its own gap, Gauss-Legendre repairs it",
        SETH,
        lemma_e_1,
        "tests/hardness/test_hardness.py::test_quadrature_error_stays_below_its_bound_and_left_riemann_misses_the_gap",
        "hardness",
    ),
    Row(
        "App. E",
        "AAttLGC is an ALoRAGC: C1 B = A1, A = [X, 0], W*_Q = 0",
        "holds",
        embedding,
        EMBEDS,
    ),
    Row(
        "Rem. 4.2",
        "one data point is already hard, so mini-batches are too; runs in mini-batches do get there",
        SETH,
        mini_batch,
        "tests/gradients/test_exact.py::test_the_gradient_is_the_derivative_of_the_loss",
        "crossing",
    ),
    Row(
        "Theorem 4.1, W*_Q",
        "W*_Q may be anything: the proof takes W*_Q = 0, an instance that the theorem allows",
        "holds",
        free_weight,
        "tests/hardness/test_hardness.py::test_the_path_integral_recovers_the_sum_of_tau_squared",
    ),
)
