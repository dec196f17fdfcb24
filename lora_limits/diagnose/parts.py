"""One projection of one head: its input, weight, bias and adapter, as a LoRAProblem takes them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_limits.diagnose.projections import Projection
from lora_limits.problem import Adapter


@dataclasses.dataclass
class Part:
    """One projection of one head: X and W with the bias as a last column and row, the adapter."""

    x: np.ndarray
    w: np.ndarray
    adapter: Adapter | None
    scale: float

    def rows(self) -> Float[np.ndarray, "l d"]:
        """What the projection puts out, adapter in."""
        return self.x @ self.w + self.added()

    def added(self) -> Float[np.ndarray, "l d"]:
        """What the adapter adds."""
        if self.adapter is None:
            return np.zeros((1, self.w.shape[1]), np.float32)
        return self.scale * (self.x @ self.adapter.b) @ self.adapter.a

    def reordered(self, columns: np.ndarray) -> Part:
        """With the coordinates of the head in another order."""
        old = self.adapter
        adapter = None if old is None else Adapter(old.a[:, columns], old.b)
        return Part(self.x, self.w[:, columns], adapter, self.scale)


class Inputs:
    """The inputs of one layer in one window, each held once: with and without a column of ones."""

    def __init__(self) -> None:
        self._host: dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]] = {}
        self._device: dict[int, tuple[np.ndarray, jax.Array]] = {}

    def host(self, x: np.ndarray, ones: bool) -> np.ndarray:
        """x, with a column of ones or without."""
        # The array itself is held too, so that no other takes its identity.
        if (id(x), ones) not in self._host:
            made = np.hstack([x, np.ones((len(x), 1), x.dtype)]) if ones else x
            self._host[id(x), ones] = (x, made)
        return self._host[id(x), ones][1]

    def device(self, x: np.ndarray) -> jax.Array:
        """x as JAX's, in float32."""
        if id(x) not in self._device:
            self._device[id(x)] = (x, jnp.asarray(x, jnp.float32))
        return self._device[id(x)][1]


def take_part(
    p: Projection, x: Float[np.ndarray, "l d_model"], place: int, width: int, inputs: Inputs
) -> Part:
    """A head's columns of a projection. place: of the head among those of the projection."""
    own = slice(place * width, (place + 1) * width)
    w = p.weight[:, own]
    b = p.b
    biased = p.bias is not None
    # The bias becomes a last row of W, which the adapter leaves alone.
    if p.bias is not None:
        w = np.vstack([w, p.bias[None, own]])
        b = None if b is None else np.vstack([b, np.zeros((1, b.shape[1]), b.dtype)])
    adapter = None if b is None or p.a is None else Adapter(a=p.a[:, own], b=b)
    return Part(inputs.host(x, biased), w, adapter, p.scale)
