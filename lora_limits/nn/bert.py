"""BERT encoders, all-MiniLM-L6-v2 among them, read from safetensors into LoRA attention layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_limits.linalg import AnyArray
from lora_limits.nn import folder as folders
from lora_limits.nn.folder import Layout, Pretrained
from lora_limits.nn.layered import check_length, check_no_gate
from lora_limits.nn.lora import LoRA, LoRAAttention, Norm, Projection, to_unit_size

SIZES = {
    "vocab_size": "vocabulary",
    "hidden_size": "d_model",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "intermediate_size": "mlp",
    "max_position_embeddings": "length",
}
EMBEDDINGS = {
    "embedding": "word_embeddings",
    "position": "position_embeddings",
    "segment": "token_type_embeddings",
}
# Of a layer: ours, and what it is called in the file.
PARTS = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
LAYOUT = Layout("encoder.layer", PARTS, "bert.")
EXPECTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


class Block(nnx.Module):
    """norm(x + attention(x)), then norm(x + MLP(x)), all with biases."""

    def __init__(
        self, sizes: dict[str, int], epsilon: float, lora: LoRA, method: Any, *, rngs: nnx.Rngs
    ):
        d = sizes["d_model"]
        heads = sizes["heads"]
        self.attention = LoRAAttention(
            d, heads, d // heads, lora, method=method, bias=True, rngs=rngs
        )
        self.attention_norm = Norm(d, epsilon=epsilon)
        self.up = Projection(d, sizes["mlp"], lora.on("up"), bias=True, rngs=rngs)
        self.down = Projection(sizes["mlp"], d, lora.on("down"), bias=True, rngs=rngs)
        self.mlp_norm = Norm(d, epsilon=epsilon)

    def __call__(
        self, x: Float[Array, "b l d_model"], probe: Float[Array, "b l heads width"] | None
    ) -> tuple[Float[Array, "b l d_model"], Float[Array, "b l d_model"]]:
        """(tokens after the block, what its attention reads: its input)."""
        between = self.attention_norm(x + self.attention(x, probe))
        hidden = jax.nn.gelu(self.up(between), approximate=False)
        return self.mlp_norm(between + self.down(hidden)), x


class Bert(Pretrained):
    """A post-norm encoder: tokens (B, L) -> hidden states (B, L, d_model).

    Sequences are of one length, without padding. What a layer's attention reads is the layer's
    input itself. Time and memory: those of the layers' methods, else linear in L.
    Raises ValueError for more tokens than there are positions, and for an adapted gate, as the MLPs
    have none.
    """

    layout = LAYOUT
    task = "FEATURE_EXTRACTION"

    def __init__(
        self, sizes: dict[str, int], epsilon: float, lora: LoRA, method: Any, *, rngs: nnx.Rngs
    ):
        check_no_gate(lora)
        d = sizes["d_model"]
        self.lora = lora
        self.embedding = nnx.Param(jnp.zeros((sizes["vocabulary"], d), jnp.float32))
        self.position = nnx.Param(jnp.zeros((sizes["length"], d), jnp.float32))
        self.segment = nnx.Param(jnp.zeros(d, jnp.float32))
        self.norm = Norm(d, epsilon=epsilon)
        blocks = [Block(sizes, epsilon, lora, method, rngs=rngs) for _ in range(sizes["layers"])]
        self.blocks = nnx.List(blocks)

    def enter(self, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b l d_model"]:
        """Embeddings of tokens and positions, normalised."""
        check_length(tokens, len(self.position[...]))
        # All tokens are of the first segment, whose embedding is the same for each.
        place = self.position[...][: tokens.shape[1]] + self.segment[...][None]
        return self.norm(self.embedding[...][tokens] + place[None])

    def leave(self, x: Float[Array, "b l d_model"]) -> Float[Array, "b l d_model"]:
        """The hidden states are the output."""
        return x


def embed(model: Bert, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b d_model"]:
    """The sentence embeddings of sentence-transformers: the mean over tokens, of length 1."""
    mean = model(tokens).mean(1)
    # to_unit_size gives a mean square of 1, a vector of length sqrt(d_model).
    return to_unit_size(mean, 0.0) / jnp.asarray(mean.shape[-1] ** 0.5, mean.dtype)


def load(folder: str | Path, lora: LoRA, *, method: Any, rngs: nnx.Rngs) -> Bert:
    """The encoder in a Hugging Face folder, float32, with fresh adapters.

    The folder holds config.json and model.safetensors.
    Raises ValueError for a folder that is not of a BERT with absolute positions and GELU, and for
    missing or unfitting arrays.
    """
    folder = Path(folder)
    config = folders.read_config(folder)
    folders.check(config, folder, EXPECTED, {*SIZES, "layer_norm_eps"})
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    model = Bert(sizes, config["layer_norm_eps"], lora, method, rngs=rngs)
    arrays = folders.read_arrays(folder, model)
    for ours, theirs in EMBEDDINGS.items():
        weight = arrays.get(f"embeddings.{theirs}.weight")
        if ours == "segment" and weight is not None:
            # Every token is of segment 0.
            weight = weight[0]
        folders.put(getattr(model, ours), weight, f"embeddings.{theirs}")
    folders.fill(model.norm, arrays, "embeddings.LayerNorm")
    folders.fill_blocks(model, arrays)
    return model
