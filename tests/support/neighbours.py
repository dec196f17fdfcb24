"""Instances of near neighbours with a known answer, and oracles with a known error, for the
hardness tests.
"""

import math

import jax
import numpy as np

from lora_limits import hardness
from lora_limits.hardness import instances

EXACT = hardness.gradient_oracle()
MAKERS = {"random": instances.random_neighbours, "clustered": instances.clustered_neighbours}
DECIDERS = ("readout", "path")


def sizes(n):
    """Width 6 log2 n, distance 2, gap width / 8: R / ln n is a constant."""
    width = 6 * round(math.log2(n))
    return width, 2, width // 8


def neighbours(rng, n, kind, answer):
    a, b = MAKERS[kind](rng, n, *sizes(n), answer)
    _, distance, gap = sizes(n)
    assert (instances.closest(a, b) <= distance) == answer
    assert answer or instances.closest(a, b) >= distance + gap
    return a, b, distance, gap


def odds(gadget, beta0, sigma):
    """o_i from the definition, with no pads and no softmax."""
    scores = beta0 * (gadget.queries @ gadget.keys.T - gadget.level) - sigma
    return np.exp(scores).sum(1)


def noisy(error):
    """The exact oracle with error(entries) added to every entry of every array."""

    def oracle(problem):
        return jax.tree.map(lambda x: np.asarray(x) + error(x.shape), EXACT(problem))

    return oracle
