"""From a tolerance to the cheapest method that certifies it, by a cost model and the certificate."""

from __future__ import annotations

import math

import jax
import numpy as np

from lora_limits.checks import fail
from lora_limits.gradients.cost import affordable, exact_method
from lora_limits.gradients.guessing import guess
from lora_limits.gradients.methods import Polynomial
from lora_limits.gradients.solve import gradient
from lora_limits.method import Method
from lora_limits.problem import LoRAProblem, check_static, check_values

_gradient = jax.jit(gradient, static_argnames="method")


def _certified(problem: LoRAProblem, method: Polynomial, tolerance: float) -> bool:
    bound = _gradient(problem, method=method).bound
    return all(float(b) <= tolerance for b in jax.tree.leaves(bound))


def choose(problem: LoRAProblem, tolerance: float) -> Method:
    """The cheapest method that certifies every array within `tolerance` in max norm; else Exact.

    The cost model gives the largest degree that beats the exact gradient; sampled rows give a first
    guess of the degree needed; the certificate of a real run decides, degree by degree upwards, and
    once downwards. Taylor only: its certificate is the tightest. Concrete problems only (not under
    jit). Costs a few polynomial gradients.
    Raises ValueError for a tolerance that is not a positive number, and as `gradient`.
    """
    if not (isinstance(tolerance, int | float | np.floating) and 0 < float(tolerance) < math.inf):
        fail("tolerance", repr(tolerance), "a number above 0")
    check_static(problem)
    check_values(problem)
    most = affordable(problem)
    degree = guess(problem, float(tolerance), most)
    if degree > most + 1:
        return exact_method(problem)
    degree = min(degree, most)
    if _certified(problem, Polynomial(degree), tolerance):
        while degree > 0 and _certified(problem, Polynomial(degree - 1), tolerance):
            degree -= 1
        return Polynomial(degree)
    for higher in range(degree + 1, min(degree + 2, most) + 1):
        if _certified(problem, Polynomial(higher), tolerance):
            return Polynomial(higher)
    return exact_method(problem)
