"""What models of LoRA attention layers share: a method for each layer, and the way through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_limits.checks import fail
from lora_limits.linalg import AnyArray
from lora_limits.nn.lora import HeadMethod, LoRA


class Layered(nnx.Module):
    """enter, `blocks` with an `attention` each, leave.

    A block: (x, probe) -> (x, what its attention reads). remat: the blocks' activations are
    computed again on the way back, so that a gradient keeps one (B, L, d_model) array a layer.
    """

    embedding: nnx.Param
    blocks: nnx.List
    enter: Callable[..., Any]
    leave: Callable[..., Any]
    remat: bool = False

    @property
    def methods(self) -> tuple[HeadMethod, ...]:
        """The method of each layer's attention."""
        return tuple(block.attention.method for block in self.blocks)

    def set_methods(self, methods: Sequence[HeadMethod]) -> None:
        """Gives each layer its method, in place. Raises ValueError unless there is one for each."""
        if len(methods) != len(self.blocks):
            fail("methods", len(methods), f"{len(self.blocks)}, one for each layer")
        for block, method in zip(self.blocks, methods, strict=True):
            block.attention.method = method

    def trace(
        self,
        tokens: Int[AnyArray, "b l"],
        probes: Sequence[Float[Array, "b l heads width"]] | None = None,
    ) -> tuple[Float[Array, "b ..."], tuple[Float[Array, "b l d_model"], ...]]:
        """(output, what each layer's attention reads). probes: added to the heads' outputs.

        With what it reads and the cotangents of its heads a layer is a problem of its own.
        """
        x = self.enter(tokens)
        read = []
        for n, block in enumerate(self.blocks):
            probe = None if probes is None else probes[n]
            x, seen = _again(block, x, probe) if self.remat else block(x, probe)
            read.append(seen)
        return self.leave(x), tuple(read)

    def __call__(self, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b ..."]:
        return self.trace(tokens)[0]


def _again(block: Any, x: Any, probe: Any) -> Any:
    """The block, computed once more on the way back."""
    graphdef, state = nnx.split(block)

    def run(state, x, probe):
        return nnx.merge(graphdef, state)(x, probe)

    return jax.checkpoint(run)(state, x, probe)


def check_length(tokens: Int[AnyArray, "b l"], most: int) -> None:
    """Raises ValueError for more tokens than the model has positions."""
    if tokens.shape[1] > most:
        fail("tokens", f"{tokens.shape[1]} of them", f"at most {most}")


def check_no_gate(lora: LoRA) -> None:
    """Raises ValueError for an adapted gate, in a model whose MLPs have none."""
    if "gate" in lora.adapt:
        fail("adapt", repr(lora.adapt), "names of this model's projections: its MLPs have no gate")
