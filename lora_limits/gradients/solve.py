"""The verb: a LoRAProblem and a method go in, a GradientResult comes out."""

from __future__ import annotations

import jax

from lora_limits.checks import check_integer, fail
from lora_limits.gradients import exact
from lora_limits.heads.tokens import settled
from lora_limits.method import GradientResult, Method, Sampling
from lora_limits.problem import LoRAProblem, as_jax, check_static
from lora_limits.problem_checks import refuse_structure


def gradient(
    problem: LoRAProblem,
    method: Method,
    *,
    rows: int | None = None,
    key: jax.Array | None = None,
    delta: float = 1e-6,
) -> GradientResult:
    """Gradients of the loss in every adapter of the problem.

    dl/dA = s B^T (dl/dW), dl/dB = s (dl/dW) A^T with dl/dW_Q = beta X_Q^T p K,
    dl/dW_K = beta X_K^T p^T Q, dl/dW_V = X_V^T f^T c (Lemmas 3.1, 3.2, D.4, corrected).
    jit with `method` (and `rows`, `delta`) static; vmap over a batch of problems. rows, key: for
    `confident` and `estimate`, how many queries to draw and the key to draw them with; not with
    Exact, Chain. delta: the chance at which `confident` may be wrong, all arrays together; N calls
    may be wrong with N times that.
    Exact: O(Lq Lk (d + d_value)). Polynomial: O(L k (d + 1)), k = binom(d + g, g); valid for any
    input, useful while max |score| = o(log L) (Theorems 3.1 and A.1); its estimate
    O(rows L (d + d_model)). Other factors: see factors/.
    Raises ValueError for problems that do not fit together, for `rows` without `key` or with a
    method that they do not apply to, for anything that is not a method, and for what a problem has
    (causal, rotations, ...) and the method does not know.
    """
    check_static(problem)
    if (rows is None) != (key is None):
        fail("rows, key", f"{rows!r}, {key!r}", "both or neither")
    if not (isinstance(delta, float) and 0 < delta < 1):
        fail("delta", repr(delta), "a probability between 0 and 1")
    if not isinstance(method, Method):
        fail("method", repr(method), "Exact, Polynomial, Chain or a factor (Svd, Skeleton, ...)")
    sampling = None
    if rows is not None and key is not None:
        sampling = Sampling(check_integer("rows", rows, 2), key, delta)
    refuse_structure(problem, repr(method), method.knows)
    return method.solve(settled(as_jax(problem)), sampling)


def loss(problem: LoRAProblem) -> jax.Array:
    """The exact loss 1/2 || f V - Y ||_F^2 (Definition 1.2, one data point).

    O(Lq Lk d) time, memory linear in L. Raises ValueError for problems that do not fit together.
    """
    check_static(problem)
    return exact.tiled_loss(settled(as_jax(problem)))
