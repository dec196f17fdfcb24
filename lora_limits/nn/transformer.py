"""A small pre-norm transformer of LoRA attention layers: a classifier, or a causal decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_limits.checks import fail
from lora_limits.gradients.methods import Exact
from lora_limits.linalg import AnyArray
from lora_limits.nn.lora import HeadMethod, LoRA, LoRAAttention, Norm, Projection


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Transformer.

    classes: of a classifier; None: a causal decoder that predicts the next token. length: the
    longest sequence. heads x width need not be d_model. softmax_1, normalised: as LoRAAttention has
    them.
    """

    vocabulary: int
    classes: int | None
    length: int
    d_model: int = 32
    heads: int = 4
    width: int = 8
    layers: int = 2
    mlp: int = 64
    softmax_1: bool = False
    normalised: bool = False


class Block(nnx.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, shape: Shape, lora: LoRA, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(shape.d_model)
        self.attention = LoRAAttention(
            shape.d_model,
            shape.heads,
            shape.width,
            lora,
            method=Exact(),
            is_causal=shape.classes is None,
            softmax_1=shape.softmax_1,
            normalised=shape.normalised,
            rngs=rngs,
        )
        self.mlp_norm = Norm(shape.d_model)
        self.up = Projection(shape.d_model, shape.mlp, bias=True, rngs=rngs)
        self.down = Projection(shape.mlp, shape.d_model, bias=True, rngs=rngs)


class Layered(nnx.Module):
    """What models of LoRA attention layers share: `blocks` with an `attention`, a method for each.

    trace: (tokens, probes) -> (output, what each layer's attention reads).
    """

    embedding: nnx.Param
    blocks: nnx.List
    trace: Callable[..., Any]

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

    def __call__(self, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b ..."]:
        return self.trace(tokens)[0]


class Transformer(Layered):
    """Embeddings, learnt positions, pre-norm blocks, a norm and a linear head.

    tokens (B, L) integers -> logits: (B, classes) from the mean over tokens, or, without classes,
    (B, L, vocabulary) of which entry t depends on tokens up to t alone. Every layer starts with
    Exact(); `set_methods` changes that. dtype follows the parameters. Time and memory: those of the
    layers' methods, else linear in L.
    Raises ValueError for tokens longer than shape.length, and as LoRAAttention does.
    """

    def __init__(self, shape: Shape, lora: LoRA, *, rngs: nnx.Rngs):
        self.shape = shape
        d = shape.d_model
        normal = jax.random.normal
        self.embedding = nnx.Param(normal(rngs.params(), (shape.vocabulary, d), jnp.float32))
        self.position = nnx.Param(normal(rngs.params(), (shape.length, d), jnp.float32) / 2)
        self.blocks = nnx.List([Block(shape, lora, rngs=rngs) for _ in range(shape.layers)])
        self.norm = Norm(d)
        self.head = Projection(d, shape.classes or shape.vocabulary, bias=True, rngs=rngs)

    def trace(
        self,
        tokens: Int[AnyArray, "b l"],
        probes: Sequence[Float[Array, "b l heads width"]] | None = None,
    ) -> tuple[Float[Array, "b ..."], tuple[Float[Array, "b l d_model"], ...]]:
        """(logits, what each layer's attention reads). probes: added to the heads' outputs."""
        if tokens.shape[1] > self.shape.length:
            fail("tokens", f"{tokens.shape[1]} of them", f"at most {self.shape.length}")
        # What attention reads is kept: with it and the cotangents a layer is a problem of its own.
        x = self.embedding[...][tokens] + self.position[...][None, : tokens.shape[1]]
        read = []
        for n, block in enumerate(self.blocks):
            read.append(block.attention_norm(x))
            x = x + block.attention(read[-1], None if probes is None else probes[n])
            hidden = jax.nn.gelu(block.up(block.mlp_norm(x)))
            x = x + block.down(hidden)
        # Classes are read off the mean over tokens, next tokens off each.
        x = self.norm(x)
        return self.head(x if self.shape.classes is None else x.mean(1)), tuple(read)
