"""What a training run is fed with: tokens and labels, in batches that depend on the step alone."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int


class Data(NamedTuple):
    """n examples, int32."""

    tokens: Int[np.ndarray, "n l"]
    labels: Int[np.ndarray, "n ..."]  # (n,) classes, or (n, l) next tokens


class Splits(Protocol):
    """Anything with a part to train on and a part that is held out."""

    @property
    def train(self) -> Data: ...

    @property
    def test(self) -> Data: ...


def batch(data: Data, size: int, seed: int, step: int) -> Data:
    """The batch of one step, drawn without replacement; all the data where it is less than `size`.

    A function of (seed, step) alone, so that a run can resume.
    """
    # A generator for each step, rather than one for the run, has no state to keep.
    count = len(data.tokens)
    rows = np.random.default_rng([seed, step]).choice(count, min(size, count), replace=False)
    return Data(data.tokens[rows], data.labels[rows])


def first(data: Data, count: int) -> Data:
    """The first `count` examples."""
    return Data(data.tokens[:count], data.labels[:count])
