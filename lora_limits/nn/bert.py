"""BERT encoders, all-MiniLM-L6-v2 among them, read from safetensors into LoRA attention layers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lora_limits.checks import fail
from lora_limits.linalg import AnyArray
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
# Of a layer: ours, and what it is called in the file after "encoder.layer.N.". Kernels are stored
# transposed.
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
    """A post-norm encoder: tokens (B, L) -> hidden states (B, L, d_model).

    Sequences are of one length, without padding. What a layer's attention reads is the layer's
    input itself. Time and memory: those of the layers' methods, else linear in L.
    Raises ValueError for more tokens than there are positions.
    """

    def __init__(
        self, sizes: dict[str, int], epsilon: float, lora: LoRA, method: Any, *, rngs: nnx.Rngs
    ):
        d = sizes["d_model"]
        self.embedding = nnx.Param(jnp.zeros((sizes["vocabulary"], d), jnp.float32))
        self.position = nnx.Param(jnp.zeros((sizes["length"], d), jnp.float32))
        self.segment = nnx.Param(jnp.zeros(d, jnp.float32))
        self.norm = Norm(d, epsilon=epsilon)
        blocks = [Block(sizes, epsilon, lora, method, rngs=rngs) for _ in range(sizes["layers"])]
        self.blocks = nnx.List(blocks)

    def trace(
        self, tokens: Int[AnyArray, "b l"], probes: Any = None
    ) -> tuple[Float[Array, "b l d_model"], tuple[Float[Array, "b l d_model"], ...]]:
        """(hidden states, what each layer's attention reads). probes: added to heads' outputs."""
        positions = len(self.position[...])
        if tokens.shape[1] > positions:
            fail("tokens", f"{tokens.shape[1]} of them", f"at most {positions}")
        # All tokens are of the first segment, whose embedding is the same for each.
        place = self.position[...][: tokens.shape[1]] + self.segment[...][None]
        x = self.norm(self.embedding[...][tokens] + place[None])
        read = []
        for n, block in enumerate(self.blocks):
            read.append(x)
            x = block.attention_norm(x + block.attention(x, None if probes is None else probes[n]))
            hidden = jax.nn.gelu(block.up(x), approximate=False)
            x = block.mlp_norm(x + block.down(hidden))
        return x, tuple(read)


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
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        arrays = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        # The libraries' own traceback would say no more than its first line.
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder}: got {reason}, expected a BERT's folder") from None
    _check_config(config, folder)
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    model = Bert(sizes, config["layer_norm_eps"], lora, method, rngs=rngs)
    # Files saved with a head on top have the encoder one level down.
    arrays = {name.removeprefix("bert."): array for name, array in arrays.items()}
    for ours, theirs in EMBEDDINGS.items():
        weight = arrays.get(f"embeddings.{theirs}.weight")
        if ours == "segment" and weight is not None:
            # Every token is of segment 0.
            weight = weight[0]
        _put(getattr(model, ours), weight, f"embeddings.{theirs}")
    _fill(model.norm, arrays, "embeddings.LayerNorm")
    for n, block in enumerate(model.blocks):
        for ours, theirs in PARTS.items():
            module = functools.reduce(getattr, ours.split("."), block)
            _fill(module, arrays, f"encoder.layer.{n}.{theirs}")
    return model


def _check_config(config: dict[str, Any], folder: Path) -> None:
    """Raises ValueError unless the config is of a BERT that this module can be."""
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            fail(f"{folder}: {name}", repr(config[name]), repr(value))
    missing = sorted({*SIZES, "layer_norm_eps"} - config.keys())
    if missing:
        fail(f"{folder}: config.json", f"no {missing[0]}", "one")


def _fill(module: Projection | Norm, arrays: dict[str, Any], name: str) -> None:
    """Puts a layer of the file into a module of ours."""
    weight, bias = (arrays.get(f"{name}.{part}") for part in ("weight", "bias"))
    if isinstance(module, Norm):
        _put(module.gain, weight, name)
        _put(module.shift, bias, name)
    else:
        # The file holds (out, in).
        _put(module.kernel, None if weight is None else weight.T, name)
        _put(module.bias, bias, name)


def _put(param: Any, array: Any, name: str) -> None:
    """Puts an array of the file, called `name` there, into a parameter of ours."""
    if array is None or array.shape != param.shape:
        fail(name, "none" if array is None else f"shape {array.shape}", param.shape)
    param.set_value(jnp.asarray(array, jnp.float32))
