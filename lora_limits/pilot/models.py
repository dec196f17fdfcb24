"""The user's model as a pilot trains it: adapters, and a classifier on top of an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from lora_limits.linalg import AnyArray
from lora_limits.nn import adapter_files, pretrained
from lora_limits.nn.folder import Pretrained
from lora_limits.nn.layered import Layered
from lora_limits.nn.lora import LoRA, Projection

# What is trained: adapters, and the classifier where there is one.
TRAINED = nnx.Any(nnx.LoRAParam, nnx.PathContains("classifier"))
CLASSIFIER = "classifier.safetensors"


class Classifier(Layered):
    """Classes off the mean over an encoder's hidden states: tokens (B, L) -> logits (B, classes)."""

    def __init__(self, encoder: Pretrained, classes: int, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.embedding = encoder.embedding
        self.blocks = encoder.blocks
        width = encoder.embedding[...].shape[1]
        self.classifier = Projection(width, classes, bias=True, rngs=rngs)

    def enter(self, tokens: Int[AnyArray, "b l"]) -> Float[Array, "b l d_model"]:
        """The encoder's own."""
        return self.encoder.enter(tokens)

    def leave(self, x: Float[Array, "b l d_model"]) -> Float[Array, "b classes"]:
        """Logits of the classes."""
        return self.classifier(self.encoder.leave(x).mean(1))


def load(folder: Path, lora: LoRA, classes: int | None, method: Any, seed: int) -> Layered:
    """The model in a folder with fresh adapters of that seed; a decoder where classes is None.

    A decoder computes its activations again on the way back, as is usual at its size.
    Raises ValueError as `pretrained.load` does.
    """
    rngs = nnx.Rngs(seed)
    model = pretrained.load(folder, lora, method=method, rngs=rngs)
    if classes is None:
        model.remat = True
        return model
    return Classifier(model, classes, rngs=rngs)


def save(model: Layered, classes: tuple[str, ...] | None, folder: Path) -> None:
    """Adapters as `peft` reads them, and the classifier beside them: weight (classes, d_model), bias,
    and the names of the classes in the file's metadata.
    """
    if not isinstance(model, Classifier):
        assert isinstance(model, Pretrained)
        adapter_files.save(model, folder)
        return
    adapter_files.save(model.encoder, folder)
    top = model.classifier
    assert top.bias is not None
    # A transposed view would be written in the wrong order.
    weight = np.ascontiguousarray(np.asarray(top.kernel[...], np.float32).T)
    arrays = {"weight": weight, "bias": np.asarray(top.bias[...], np.float32)}
    save_file(arrays, folder / CLASSIFIER, metadata={"classes": json.dumps(classes)})
