"""A small pre-norm transformer of LoRA attention layers: a classifier, or a causal decoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_limits.gradients.methods import Exact
from lora_limits.linalg import AnyArray
from lora_limits.nn.layered import Layered, check_length, check_no_gate
from lora_limits.nn.lora import LoRA, LoRAAttention, Norm, Projection


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
        d = shape.d_model
        self.attention_norm = Norm(d)
        self.attention = LoRAAttention(
            d,
            shape.heads,
            shape.width,
            lora,
            method=Exact(),
            is_causal=shape.classes is None,
            softmax_1=shape.softmax_1,
            normalised=shape.normalised,
            rngs=rngs,
        )
        self.mlp_norm = Norm(d)
        self.up = Projection(d, shape.mlp, lora.on("up"), bias=True, rngs=rngs)
        self.down = Projection(shape.mlp, d, lora.on("down"), bias=True, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d_model"], probe: Float[Array, "b l heads width"] | None
    ) -> tuple[Float[Array, "b l d_model"], Float[Array, "b l d_model"]]:
        """(tokens after the block, what its attention reads)."""
        read = self.attention_norm(x)
        x = x + self.attention(read, probe)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x)))
        return x + self.down(hidden), read


class Transformer(Layered):
    """Embeddings, learnt positions, pre-norm blocks, a norm and a linear head.

    tokens (B, L) integers -> logits: (B, classes) from the mean over tokens, or, without classes,
    (B, L, vocabulary) of which entry t depends on tokens up to t alone. Every layer starts with
    Exact(); `set_methods` changes that. dtype follows the parameters. Time and memory: those of the
    layers' methods, else linear in L.
    Raises ValueError for tokens longer than shape.length, for an adapted gate, as the MLPs have
    none, and as LoRAAttention does.
    """

    def __init__(self, shape: Shape, lora: LoRA, *, rngs: nnx.Rngs):
        check_no_gate(lora)
        self.shape = shape
        d = shape.d_model
        normal = jax.random.normal
        self.embedding = nnx.Param(normal(rngs.params(), (shape.vocabulary, d), jnp.float32))
        self.position = nnx.Param(normal(rngs.params(), (shape.length, d), jnp.float32) / 2)
        self.blocks = nnx.List([Block(shape, lora, rngs=rngs) for _ in range(shape.layers)])
        self.norm = Norm(d)
        self.head = Projection(d, shape.classes or shape.vocabulary, bias=True, rngs=rngs)

    def enter(self, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b l d_model"]:
        """Embeddings and positions of tokens."""
        check_length(tokens, self.shape.length)
        return self.embedding[...][tokens] + self.position[...][None, : tokens.shape[1]]

    def leave(self, x: Float[Array, "b l d_model"]) -> Float[Array, "b ..."]:
        """Logits: classes are read off the mean over tokens, next tokens off each."""
        x = self.norm(x)
        return self.head(x if self.shape.classes is None else x.mean(1))
