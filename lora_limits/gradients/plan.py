"""The plan of a polynomial gradient: all that every sweep over tokens reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_limits.certificate import columns
from lora_limits.certificate.columns import Columns
from lora_limits.coordinates import blocks, collectives
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.sampling import Sample
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem


class Plan(NamedTuple):
    """Made once before the sweeps; nothing in it changes from block to block.

    axis: mesh axes over which tokens are split, None on one device. block: tokens to a block. chunks:
    how many parts, none longer than this one, come one after another (streamed.py).
    """

    problem: LoRAProblem
    method: Any  # a Polynomial
    frame: Frame
    sample: Sample
    maps: blocks.Maps
    columns: Columns | None  # None where nothing is certified
    block: int
    axis: Axis
    sampled: bool = False  # whether the certificate is kept query by query
    chunks: int = 1

    @property
    def degree(self) -> int:
        return self.method.degree

    @property
    def width(self) -> int:
        """d, the width of the head."""
        return self.problem.weights.query.shape[1]

    @property
    def value_width(self) -> int:
        return self.problem.weights.value.shape[1]

    @property
    def features(self) -> int:
        """k = binom(d + g, g)."""
        return monomials.count(self.width, self.degree)

    @property
    def features_below(self) -> int:
        """The number of features below the top degree; those of degree 0 if that is the top."""
        return monomials.count(self.width, max(self.degree - 1, 0))

    @property
    def parts(self) -> int:
        """How many parts of the tokens are swept apart and summed: by devices, or in chunks."""
        return collectives.devices(self.axis) * self.chunks

    def keys(self, first: Int[Array, ""], fresh: Bool[Array, " n"]) -> blocks.Keys:
        """The block of keys and values that starts at token `first`."""
        return blocks.keys(self.problem, self.frame, self.maps, first, fresh, self.block)

    def queries(self, first: Int[Array, ""]) -> blocks.Queries:
        """The block of queries that starts at token `first`."""
        return blocks.queries(self.problem, self.frame, self.maps, first, self.block)

    def from_y(self) -> Float[Array, "d_and_1 d"]:
        """What takes a gradient in (y, log-weight) to one in the key itself."""
        frame = self.frame
        return jnp.concatenate([frame.to_y, frame.beta * frame.nu[None]])


def block_size(problem: LoRAProblem, degree: int) -> int:
    """Tokens to a block.

    On a CPU a power of two from 128 to 2048 whose largest array has about 2^20 entries, to stay in
    cache; on an accelerator, which must be filled, the largest equal parts of the input of at most
    2^25 entries.
    """
    d = problem.weights.query.shape[1]
    dv = problem.weights.value.shape[1]
    r = problem.adapters["value"].a.shape[0] if "value" in problem.adapters else 0
    entries = max(monomials.count(d, degree), d * (1 + dv + r))
    if jax.default_backend() == "cpu":
        return 2 ** min(max((2**20 // entries).bit_length() - 1, 7), 11)
    tokens = max(problem.x_query.shape[0], problem.x_key.shape[0])
    return -(-tokens // -(-tokens // max(2**25 // entries, 128)))


def make(problem: LoRAProblem, method: Any, axis: Axis = None, *, certified: bool = True) -> Plan:
    """The plan of a Polynomial method. O(L d_model d) time."""
    block = method.block_size or block_size(problem, method.degree)
    frame, sample = frames.with_sample(problem, block, method.centred, axis)
    return Plan(
        problem,
        method,
        frame,
        sample,
        blocks.maps(problem, frame),
        columns.make(problem, sample, axis) if certified else None,
        block,
        axis,
    )
