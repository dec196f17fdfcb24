"""Decoders of Llama's kind, SmolLM2 among them, read from safetensors into LoRA attention layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_limits.checks import fail
from lora_limits.linalg import AnyArray, dot
from lora_limits.nn import folder as folders
from lora_limits.nn.folder import Layout, Pretrained
from lora_limits.nn.layered import check_length
from lora_limits.nn.lora import LoRA, LoRAAttention, Projection, RMSNorm

PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LAYOUT = Layout("layers", PARTS, "model.")
EXPECTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama, and the constants of its norms and rotations.

    key_heads: each is read by heads / key_heads query heads. tied: logits are taken with the
    embedding.
    """

    vocabulary: int
    d_model: int
    heads: int
    key_heads: int
    width: int
    layers: int
    mlp: int
    length: int
    epsilon: float = 1e-6
    rotary_base: float = 10000.0
    tied: bool = True


class Block(nnx.Module):
    """x + attention(norm x), then x + down(silu(gate x') up x') with x' = norm x; no biases."""

    def __init__(self, sizes: Sizes, lora: LoRA, method: Any, *, rngs: nnx.Rngs):
        d = sizes.d_model
        self.attention_norm = RMSNorm(d, epsilon=sizes.epsilon)
        self.attention = LoRAAttention(
            d,
            sizes.heads,
            sizes.width,
            lora,
            method=method,
            is_causal=True,
            key_heads=sizes.key_heads,
            rotary_base=sizes.rotary_base,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(d, epsilon=sizes.epsilon)
        self.gate = Projection(d, sizes.mlp, lora.on("gate"), rngs=rngs)
        self.up = Projection(d, sizes.mlp, lora.on("up"), rngs=rngs)
        self.down = Projection(sizes.mlp, d, lora.on("down"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d_model"], probe: Float[Array, "b l heads width"] | None
    ) -> tuple[Float[Array, "b l d_model"], Float[Array, "b l d_model"]]:
        """(tokens after the block, what its attention reads)."""
        read = self.attention_norm(x)
        x = x + self.attention(read, probe)
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), read


class Llama(Pretrained):
    """A pre-norm causal decoder: tokens (B, L) -> logits (B, L, vocabulary).

    Rotary positions, grouped queries, SwiGLU; entry t of the logits depends on tokens up to t alone
    where the layers' methods are causal. Sequences are of one length, without padding. Time and
    memory: those of the layers' methods, else linear in L.
    Raises ValueError for more tokens than there are positions, and as LoRAAttention does.
    """

    layout = LAYOUT
    task = "CAUSAL_LM"

    def __init__(self, sizes: Sizes, lora: LoRA, method: Any, *, rngs: nnx.Rngs):
        self.sizes = sizes
        self.lora = lora
        d = sizes.d_model
        table = jax.random.normal(rngs.params(), (sizes.vocabulary, d), jnp.float32)
        self.embedding = nnx.Param(table * 0.02)
        blocks = [Block(sizes, lora, method, rngs=rngs) for _ in range(sizes.layers)]
        self.blocks = nnx.List(blocks)
        self.norm = RMSNorm(d, epsilon=sizes.epsilon)
        self.head = None if sizes.tied else Projection(d, sizes.vocabulary, rngs=rngs)

    def enter(self, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b l d_model"]:
        """Embeddings of tokens."""
        check_length(tokens, self.sizes.length)
        return self.embedding[...][tokens]

    def leave(self, x: Float[Array, "b l d_model"]) -> Float[Array, "b l vocabulary"]:
        """Logits of the next token."""
        x = self.norm(x)
        return dot(x, self.embedding[...].T) if self.head is None else self.head(x)


def load(folder: str | Path, lora: LoRA, *, method: Any, rngs: nnx.Rngs) -> Llama:
    """The decoder in a Hugging Face folder, float32, with fresh adapters.

    The folder holds config.json and safetensors, as transformers' save_pretrained writes them. A
    GGUF file is brought into that form by transformers, with the package gguf beside it:

        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        model.save_pretrained(other_folder)

    Raises ValueError for a folder that is not of a Llama without biases and with unscaled rotations,
    and for missing or unfitting arrays.
    """
    folder = Path(folder)
    config = folders.read_config(folder)
    folders.check(config, folder, EXPECTED, NEEDED)
    sizes = _sizes(config, folder)
    model = Llama(sizes, lora, method, rngs=rngs)
    arrays = folders.read_arrays(folder, model)
    folders.put(model.embedding, arrays.get("embed_tokens.weight"), "embed_tokens")
    folders.fill(model.norm, arrays, "norm")
    folders.fill_blocks(model, arrays)
    if model.head is not None:
        folders.fill(model.head, arrays, "lm_head")
    return model


def _sizes(config: dict[str, Any], folder: Path) -> Sizes:
    """Sizes of a checked config. Raises ValueError for rotations that are not the plain ones."""
    # transformers 5 writes rope_parameters, 4 wrote rope_theta.
    rotations = config.get("rope_parameters") or {}
    if rotations.get("rope_type", "default") != "default":
        fail(f"{folder}: rope_type", repr(rotations["rope_type"]), "'default'")
    heads = config["num_attention_heads"]
    return Sizes(
        vocabulary=config["vocab_size"],
        d_model=config["hidden_size"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        width=config.get("head_dim") or config["hidden_size"] // heads,
        layers=config["num_hidden_layers"],
        mlp=config["intermediate_size"],
        length=config["max_position_embeddings"],
        epsilon=config["rms_norm_eps"],
        rotary_base=rotations.get("rope_theta", config.get("rope_theta", 10000.0)),
        tied=config.get("tie_word_embeddings", False),
    )
