"""Adapters in the format of Hugging Face's PEFT, read and written without torch.

PEFT adds scaling * x A_p^T B_p^T with A_p (r, d_model) and B_p (d, r): our b is A_p^T, our a B_p^T.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_limits.checks import fail
from lora_limits.nn import folder as folders
from lora_limits.nn.folder import Layout, Pretrained
from lora_limits.nn.lora import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = "base_model.model."  # how PEFT calls the model that it has adapted
# What changes an adapter's meaning beside its arrays, and the values that leave it plain, the last
# of them where nothing is said.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    # The others change the frozen weights too.
    "init_lora_weights": (False, "gaussian", "orthogonal", "eva", None, True),
}


def save(model: Pretrained, folder: str | Path) -> None:
    """Writes the model's adapters, all in single precision, as `peft` reads them.

    The folder is made where there is none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout = model.layout
    prefix = layout.prefix if model.nested else ""
    arrays = {}
    for n, block in enumerate(model.blocks):
        for ours in _adapted(model.lora, layout):
            projection = folders.part(block, ours)
            path = f"{WRAPPED}{prefix}{layout.path(n, ours)}"
            for half, array in (("A", projection.b[...]), ("B", projection.a[...])):
                # A transposed view would be written in the wrong order.
                turned = np.ascontiguousarray(np.asarray(array, np.float32).T)
                arrays[f"{path}.lora_{half}.weight"] = turned
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": model.task,
        "base_model_name_or_path": None,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "use_rslora": model.lora.scaling == "alpha/sqrt(r)",
        "target_modules": _targets(model),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_lora(folder: str | Path, layout: Layout) -> LoRA:
    """Rank, alpha, scaling and adapted projections of the adapters in a folder.

    Raises ValueError for a folder without adapters in safetensors, for what is no plain LoRA (DoRA,
    biases, modules saved whole, ranks that differ), and for adapters of modules that this kind of
    model does not have.
    """
    config, arrays = _read(Path(folder), layout)
    ours = {theirs: name for name, theirs in layout.parts.items()}
    adapt = tuple(dict.fromkeys(ours[part].split(".")[-1] for _, part, _ in arrays))
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    return LoRA(config.get("r", 8), config.get("lora_alpha", 8), scaling, adapt)


def load(model: Pretrained, folder: str | Path) -> None:
    """Puts the adapters of a folder into a model made with its `read_lora`, in place.

    A projection that has none in the folder is left adding nothing.
    Raises ValueError as `read_lora` does, for layers that the model does not have, and for shapes
    that are not its own.
    """
    folder = Path(folder)
    arrays = _read(folder, model.layout)[1]
    layers = len(model.blocks)
    for n, block in enumerate(model.blocks):
        for ours in _adapted(model.lora, model.layout):
            projection = folders.part(block, ours)
            theirs = model.layout.parts[ours]
            a, b = (arrays.pop((n, theirs, half), None) for half in ("B", "A"))
            if a is None and b is None:
                # PEFT may have been told to adapt some layers alone; fresh halves add nothing.
                continue
            name = f"{folder}: {model.layout.path(n, ours)}"
            if a is None or b is None:
                fail(f"{folder}: layer {n}'s {theirs}", "one half", "both")
            folders.put(projection.a, a.T, name)
            folders.put(projection.b, b.T, name)
    if arrays:
        n, part, _ = next(iter(arrays))
        expected = f"layers below {layers} and projections among {model.lora.adapt}"
        fail(folder, f"an adapter of layer {n}'s {part}", expected)


def _adapted(lora: LoRA, layout: Layout) -> list[str]:
    """Dotted names of the parts that a LoRA adapts."""
    return [ours for ours in layout.parts if ours.split(".")[-1] in lora.adapt]


def _targets(model: Pretrained) -> list[str]:
    """PEFT's target_modules: the ends of paths that no other module has."""
    layout = model.layout
    ends = Counter(theirs.split(".")[-1] for theirs in layout.parts.values())
    found = []
    for ours in _adapted(model.lora, layout):
        theirs = layout.parts[ours]
        last = theirs.split(".")[-1]
        # BERT calls several modules "dense": these are named layer by layer.
        several = [f"{n}.{theirs}" for n in range(len(model.blocks))]
        found += [last] if ends[last] == 1 else several
    return found


def _read(folder: Path, layout: Layout) -> tuple[dict[str, Any], dict[tuple[int, str, str], Any]]:
    """(config, arrays by (layer, their part, "A" or "B")) of a plain adapter."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
        arrays = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder}: got {reason}, expected adapters of PEFT") from None
    for field, plain in PLAIN.items():
        if config.get(field, plain[-1]) not in plain:
            fail(f"{folder}: {field}", repr(config[field]), f"one of {list(plain)}, plain LoRA")
    parts = "|".join(re.escape(theirs) for theirs in layout.parts.values())
    layers, prefix = re.escape(layout.layers), re.escape(layout.prefix)
    known = re.compile(
        rf"{re.escape(WRAPPED)}(?:{prefix})?{layers}\.(\d+)\.({parts})\.lora_([AB])\.weight"
    )
    found = {}
    for name, array in arrays.items():
        match = known.fullmatch(name)
        if match is None:
            fail(f"{folder}: {WEIGHTS}", name, f"plain LoRA of parts of {layout.layers}.N")
        found[int(match[1]), match[2], match[3]] = array
    if not found:
        fail(f"{folder}: {WEIGHTS}", "no arrays", "adapters")
    return config, found
