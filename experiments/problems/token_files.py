"""A sequence too long for comfort: tokens in a file on disk, read chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_limits as ll
from experiments.problems import boxes
from lora_limits.linalg import AnyArray

CHUNK = 2**17  # tokens


def write(path: Path, seed: int, *, length: int, width: int) -> None:
    """Uniform tokens of norm 1 at most, float32, (length, width), made chunk by chunk."""
    rng = np.random.default_rng(seed)
    tokens = np.lib.format.open_memmap(path, "w+", np.float32, (length, width))
    for first in range(0, length, CHUNK):
        last = min(first + CHUNK, length)
        tokens[first:last] = rng.uniform(-1, 1, (last - first, width))
    # one entry meets the bound, so that Gamma is what it is said to be
    tokens[0, 0] = 1
    tokens.flush()


def chunks(
    path: Path, seed: int, *, rank: int, gamma: float
) -> Callable[[], Iterator[ll.LoRAProblem]]:
    """What `ll.streamed_gradient` reads: self-attention on the file's tokens in float64, all three
    projections adapted, targets of unit variance drawn anew, and alike, in every pass.
    """
    tokens = np.load(path, mmap_mode="r")
    like = boxes.problem("uniform", seed, length=1, width=tokens.shape[1], rank=rank, gamma=gamma)

    def read() -> Iterator[ll.LoRAProblem]:
        rng = np.random.default_rng(seed + 1)
        for first in range(0, len(tokens), CHUNK):
            x = np.asarray(tokens[first : first + CHUNK], np.float64)
            yield of_tokens(like, x, rng.normal(size=x.shape))

    return read


def whole(path: Path, seed: int, *, rank: int, gamma: float) -> ll.LoRAProblem:
    """The same in memory, its target the mean, 0. Tokens are in single precision, as they are in the
    file, and on the device once for all three projections.
    """
    x = jnp.asarray(np.load(path, mmap_mode="r"))
    like = boxes.problem("uniform", seed, length=1, width=x.shape[1], rank=rank, gamma=gamma)
    return of_tokens(like, x, jnp.zeros_like(x))


def of_tokens(like: ll.LoRAProblem, x: AnyArray, target: AnyArray) -> ll.LoRAProblem:
    """Self-attention on tokens x, all else as in `like`."""
    changed = {"x_query": x, "x_key": x, "x_value": x, "target": target}
    return jax.tree_util.tree_map_with_path(lambda at, z: changed.get(at[0].name, z), like)
