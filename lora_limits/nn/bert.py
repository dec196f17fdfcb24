"""BERT encoders, all-MiniLM-L6-v2 among them, as a base: read from safetensors into LoRA attention
layers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lora_limits.nn.lora import LoRA, LoRAAttention, Norm, Projection, to_unit_size
from lora_limits.nn.transformer import Layered

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
# Of a layer, what is called "encoder.layer.N." and this in the file. Kernels are stored transposed.
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
        self.up = Projection(d, sizes["mlp"], bias=True, rngs=rngs)
        self.down = Projection(sizes["mlp"], d, bias=True, rngs=rngs)
        self.mlp_norm = Norm(d, epsilon=epsilon)


class Bert(Layered):
    """A post-norm encoder: tokens (B, L), all of one length and none of them padding -> hidden
    states (B, L, d_model).

    What a layer's attention reads is the layer's input itself. Time and memory: those of the
    layers' methods, else linear in L. Raises ValueError for tokens longer than the positions there
    are.
    """

    def __init__(
        self, sizes: dict[str, int], epsilon: float, lora: LoRA, method: Any, *, rngs: nnx.Rngs
    ):
        d = sizes["d_model"]
        self.embedding = nnx.Param(jnp.zeros((sizes["vocabulary"], d), jnp.float32))
        self.position = nnx.Param(jnp.zeros((sizes["length"], d), jnp.float32))
        self.segment = nnx.Param(jnp.zeros(d, jnp.float32))
        self.norm = Norm(d, epsilon=epsilon)
        self.blocks = nnx.List(
            [Block(sizes, epsilon, lora, method, rngs=rngs) for _ in range(sizes["layers"])]
        )

    def trace(
        self, tokens: jax.Array, probes: Any = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(hidden states, what each layer's attention reads (B, L, d_model)). probes: added to the
        heads' outputs.
        """
        if tokens.shape[1] > len(self.position[...]):
            raise ValueError(
                f"tokens: got {tokens.shape[1]} of them, expected at most {len(self.position[...])}"
            )
        place = self.position[...][: tokens.shape[1]] + self.segment[...][None]
        x = self.norm(self.embedding[...][tokens] + place[None])
        read = []
        for n, block in enumerate(self.blocks):
            read.append(x)
            x = block.attention_norm(x + block.attention(x, None if probes is None else probes[n]))
            x = block.mlp_norm(x + block.down(jax.nn.gelu(block.up(x), approximate=False)))
        return x, tuple(read)


def embed(model: Bert, tokens: jax.Array) -> jax.Array:
    """The sentence embeddings of sentence-transformers: the mean over tokens, of length 1. (B, L)
    -> (B, d_model).
    """
    mean = model(tokens).mean(1)
    return to_unit_size(mean, 0.0) / jnp.asarray(mean.shape[-1] ** 0.5, mean.dtype)


def load(folder: str | Path, lora: LoRA, *, method: Any, rngs: nnx.Rngs) -> Bert:
    """The encoder in a Hugging Face folder (config.json, model.safetensors), float32, with fresh
    adapters.

    Raises ValueError for a folder that is not of a BERT with absolute positions and GELU, and for
    missing or unfitting arrays.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        arrays = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: got {str(error).splitlines()[0]}, expected a BERT's folder"
        ) from None
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder}: {name}: got {config[name]!r}, expected {value!r}")
    missing = sorted({*SIZES, "layer_norm_eps"} - config.keys())
    if missing:
        raise ValueError(f"{folder}: config.json: got no {missing[0]}, expected one")
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    model = Bert(sizes, config["layer_norm_eps"], lora, method, rngs=rngs)
    arrays = {name.removeprefix("bert."): array for name, array in arrays.items()}
    for ours, theirs in EMBEDDINGS.items():
        weight = arrays.get(f"embeddings.{theirs}.weight")
        first = (
            weight[0] if ours == "segment" and weight is not None else weight
        )  # every token is of segment 0
        _put(getattr(model, ours), first, f"embeddings.{theirs}")
    _fill(model.norm, arrays, "embeddings.LayerNorm")
    for n, block in enumerate(model.blocks):
        for ours, theirs in PARTS.items():
            _fill(
                functools.reduce(getattr, ours.split("."), block),
                arrays,
                f"encoder.layer.{n}.{theirs}",
            )
    return model


def _fill(module: Projection | Norm, arrays: dict[str, Any], name: str) -> None:
    """Puts a layer of the file into a module of ours."""
    weight, bias = (arrays.get(f"{name}.{part}") for part in ("weight", "bias"))
    if isinstance(module, Norm):
        _put(module.gain, weight, name)
        _put(module.shift, bias, name)
    else:
        _put(module.kernel, None if weight is None else weight.T, name)
        _put(module.bias, bias, name)


def _put(param: Any, array: Any, name: str) -> None:
    if array is None or array.shape != param.shape:
        got = "none" if array is None else f"shape {array.shape}"
        raise ValueError(f"{name}: got {got}, expected {param.shape}")
    param.set_value(jnp.asarray(array, jnp.float32))
