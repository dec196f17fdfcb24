"""Compiled gradients that several test files share, so that each method is compiled once a
session.
"""

import dataclasses
import functools

import jax

import lora_limits as ll
from tests.support.tools import quick_jit

GRADIENT = quick_jit(ll.gradient, static_argnums=1)
BLOCK = 5  # divides no length in problems.py but 5 itself
BATCH = 32


def _without(problem, method, **left_out):
    result = ll.gradient(problem, method)
    return dataclasses.replace(
        result, bound=None if result.bound is None else dict.fromkeys(result.bound), **left_out
    )


# The certificate is two thirds of a program, and is not compiled for tests that do not look at it:
# of the bound its names are left, in the second of the normaliser nothing.
UNBOUNDED = quick_jit(_without, static_argnums=1)
UNCERTIFIED = quick_jit(functools.partial(_without, normaliser=None), static_argnums=1)


def polynomial(degree, series="taylor", **options):
    """A method whose last block overlaps the one before."""
    return ll.Polynomial(degree, series, block_size=BLOCK, **options)


@functools.cache
def batched(series, degree):
    """Polynomial gradients of BATCH problems at once."""
    return quick_jit(jax.vmap(lambda p: ll.gradient(p, polynomial(degree, series))))
