"""Pretrained models of any kind that the library knows, with fresh adapters or with given ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx

from lora_limits.checks import fail
from lora_limits.nn import adapter_files, bert, llama
from lora_limits.nn import folder as folders
from lora_limits.nn.folder import Pretrained
from lora_limits.nn.lora import LoRA

KINDS = {"bert": bert, "llama": llama}


def load(folder: str | Path, lora: LoRA | str | Path, *, method: Any, rngs: nnx.Rngs) -> Pretrained:
    """The model in a Hugging Face folder, float32, by the kind that its config names.

    lora: how fresh adapters are made, or a folder of adapters in PEFT's format, of which the model
    is then given rank, scaling, projections and values.
    Raises ValueError for a kind that is not among KINDS, and as its own `load` and `adapter_files`
    do.
    """
    kind = folders.read_config(Path(folder)).get("model_type")
    if kind not in KINDS:
        fail(f"{folder}: model_type", repr(kind), f"one of {list(KINDS)}")
    module = KINDS[kind]
    if isinstance(lora, LoRA):
        return module.load(folder, lora, method=method, rngs=rngs)
    given = adapter_files.read_lora(lora, module.LAYOUT)
    model = module.load(folder, given, method=method, rngs=rngs)
    adapter_files.load(model, lora)
    return model
