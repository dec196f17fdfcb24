"""Operations as XLA counts them, from lowered programs that never run, and their growth with L."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.gradients import chain, exact
from lora_limits.ledger.row import Evidence, problem
from lora_limits.problem import LoRAProblem

COUNTED = "tests/ledger/test_theorems.py::test_operations_grow_as_counted"


def operations(function: Callable[..., Any], *args: Any) -> float:
    """Arithmetic operations of a function without loops, from its lowered form; nothing is run."""
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return float(analysis["flops"])  # pyright: ignore[reportOptionalSubscript, reportArgumentType]


def exponent(function: Callable[[int], float], length: int = 512) -> float:
    """Local exponent of a count in L, between L and 2 L."""
    return math.log2(function(2 * length) / function(length))


def abstract(length: int) -> LoRAProblem:
    """A problem of this length without numbers in it."""
    small = jax.tree.map(np.asarray, problem(square=True))
    tokens = small.x_query.shape[0]

    def grown(x: Any) -> Any:
        shape = tuple(length if n == tokens else n for n in x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(grown, small)


def naive_operations(length: int) -> float:
    """Lemma 3.1 read literally: the L x L matrix diag f_j - f_j f_j^T of every token times C_j."""

    def literal(c1, c2, f, q):
        # every block C_j of C1 kron C2, (L, L, 16) in all
        blocks = c1[:, None, :, None] * c2[None, :, None, :]
        blocks = blocks.reshape(length, length, -1)
        middle = jax.vmap(lambda row: jnp.diag(row) - jnp.outer(row, row))(f)
        return jnp.einsum("jac,jab,jb->c", blocks, middle, q, optimize=[(0, 1), (0, 1)])

    # d = 4 throughout, so that nothing but L grows
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
    """Growth of both ways to compute the same gradient."""
    cubic = exponent(naive_operations, 128)
    square = exponent(dense_operations)
    measured = f"operations ~ L^{cubic:.2f} literal, L^{square:.2f} reduced"
    return Evidence(measured, cubic > 2.9 and 1.9 < square < 2.1)


def theorem_f_1() -> Evidence:
    """Growth of the quadratic algorithm, and its constant."""
    square = exponent(dense_operations)
    ratio = dense_operations(1024) / 1024**2
    measured = f"{ratio:.0f} L^2 operations at d = 4, exponent {square:.2f}"
    return Evidence(measured, 1.9 < square < 2.1)
