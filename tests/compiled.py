"""Compiled gradients that several test files share, so that each method is compiled once a session."""

import functools

import jax
from tools import quick_jit

import lora_limits as ll

GRADIENT = quick_jit(ll.gradient, static_argnums=1)
BLOCK = 5  # divides no length in problems.py but 5 itself
BATCH = 32


def polynomial(degree, series="taylor", **options):
    """A method whose last block overlaps the one before."""
    return ll.Polynomial(degree, series, block_size=BLOCK, **options)


@functools.cache
def batched(series, degree):
    """Polynomial gradients of BATCH problems at once."""
    return quick_jit(jax.vmap(lambda p: ll.gradient(p, polynomial(degree, series))))
