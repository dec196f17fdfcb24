"""F(1) - F(0), an integral along a path of adapters, from gradients: the proof behind Lemma E.1.

Published: a left Riemann sum on log^4 n nodes. F' = O(n log n), so that leaves an error of order n
polylog(n), far above the gap it must resolve. Gauss-Legendre closes this: F is analytic around [0,
1], and the error falls geometrically. With f(lambda) = softmax(lambda S), S of row range rho and
centred row by row, and |Im lambda| <= y with theta = y rho / 2 < pi/2,

    |D(lambda)| >= cos(theta) sum_j e^(Re lambda S_ij)       so   sum_j |f_ij| <= 1 / cos(theta)
    F' = 2 sum_i tau_i Cov_f(v, S_i.)                        so   |F'| <= 2 n rho / cos(theta)^3 = M

on the Bernstein ellipse of parameter e^u whose half height over [0, 1] is y = sinh(u) / 2; m nodes
then err by at most (32/15) M e^(-2 u (m-1)) / (1 - e^(-2u)) (Trefethen, Approximation Theory and
Approximation Practice, Theorem 19.3). As rho = O(log L), O(log^2 L) nodes suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from lora_limits.polynomial.needed import smallest
from lora_limits.problem import Adapter, LoRAProblem

Oracle = Callable[[LoRAProblem], dict[str, Adapter]]
Rule = Callable[[Callable[[float], float], int], float]


def gauss_legendre(function: Callable[[float], float], nodes: int) -> float:
    """Integral of `function` over [0, 1] by Gauss-Legendre: `nodes` calls, none at the ends."""
    # nodes and weights on [-1, 1]
    x, w = np.polynomial.legendre.leggauss(nodes)
    pairs = zip(x.tolist(), w.tolist(), strict=True)
    return math.fsum(0.5 * wi * function(0.5 * (xi + 1.0)) for xi, wi in pairs)


def left_riemann(function: Callable[[float], float], nodes: int) -> float:
    """The sum as published: the mean of `function` at 0, 1/m, ..., (m-1)/m.

    Its error is about (f(1) - f(0)) / (2 m).
    """
    return math.fsum(function(i / nodes) for i in range(nodes)) / nodes


def path_derivative(problem: LoRAProblem, oracle: Oracle) -> float:
    """F'(lambda) = 2 tr(dl/dA[:, :r]) at A = [lambda I, 0], as F = 2 l: one oracle call."""
    grad = np.asarray(oracle(problem)["query"].a, np.float64)
    return 2.0 * float(np.trace(grad[:, : grad.shape[0]]))


def path_integral(
    problem_at: Callable[[float], LoRAProblem],
    oracle: Oracle,
    nodes: int,
    rule: Rule = gauss_legendre,
) -> float:
    """F(1) - F(0) = int_0^1 2 tr(dl/dA[:, :r]) dlambda, by `nodes` oracle calls and nothing else.

    problem_at: lambda -> a problem whose query adapter is A = [lambda I, 0]. rule: gauss_legendre
    or left_riemann.
    """
    # The problems are float64, which JAX would cut to float32 outside.
    with jax.enable_x64(True):
        return rule(lambda lam: path_derivative(problem_at(lam), oracle), nodes)


def error_bound(rows: int, score_range: float, nodes: int) -> float:
    """Largest error of Gauss-Legendre on F' of `rows` live queries, scores of rows within a range.

    score_range: rho above, the largest of a row's scores less its smallest.
    """
    # Every ellipse gives a bound: theta of several, and the best of them.
    theta = np.linspace(0.02, 0.98, 193) * np.pi / 2
    u = np.arcsinh(4.0 * theta / score_range)
    # (32/15) M e^(-2 u (m-1)) / (1 - e^(-2u)) in the log domain
    log_m = math.log(32 / 15 * 2 * rows * score_range) - 3 * np.log(np.cos(theta))
    log_error = log_m - 2 * u * (nodes - 1) - np.log(-np.expm1(-2 * u))
    # exp overflows beyond 709.
    return math.exp(min(700.0, float(log_error.min())))


def nodes_needed(rows: int, score_range: float, error: float) -> int:
    """Smallest node count whose error bound is at most `error`.

    It is O(score_range (log rows + log 1/error)).
    """
    return smallest(lambda m: error_bound(rows, score_range, m) <= error, 2)
