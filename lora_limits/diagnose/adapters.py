"""LoRA adapters of a real model, read and written by peft, and their halves as the library's.

peft adds scaling * x A_p^T B_p^T with A_p (r, d_model), B_p (out, r): so b = A_p^T and a = B_p^T.
Head h of a projection has its own columns of a and shares b with the others; in a fused projection
query, key, value share b too.
"""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_limits.checks import fail
from lora_limits.diagnose.activations import NAMES, Layer, find_layers
from lora_limits.diagnose.loading import one_line
from lora_limits.problem import Adapter

# What peft writes into a folder.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANK = 4  # of the random adapter
UPDATE = 0.02  # its update's Frobenius norm beside its weight's
# Fields of peft's LoraConfig that change what an adapter is, and the values with which it is plain
# LoRA, the last of them where nothing is said.
PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, "gaussian", None),  # the others change the frozen weights
}


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of all heads, and its adapter; b and a are None without one."""

    weight: Float[np.ndarray, "d_model heads_d"]
    bias: Float[np.ndarray, " heads_d"] | None
    b: Float[np.ndarray, "d_model r"] | None
    a: Float[np.ndarray, "r heads_d"] | None
    scale: float


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter in the folder on it, a peft model.

    Raises ValueError for a folder that peft cannot read, an adapter that is not plain LoRA (DoRA,
    modules_to_save, trained biases), pickled weights, and modules or shapes that are not this
    model's.
    """
    _check_folder(folder)
    import peft
    from safetensors import safe_open

    with one_line(f"{folder}: adapter of another model?"):
        with safe_open(folder / WEIGHTS, "np") as file:
            saved = set(file.keys())
        # On a model whose modules do not fit this raises, and changes nothing.
        adapted = peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
    # peft passes over what the model has no place for.
    held = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != held:
        name = min(saved ^ held)
        raise ValueError(
            f"{folder}: got an adapter of another model, {name} is in one of them only"
        )
    _check_touches(adapted, folder)
    return adapted.eval()


def _check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder holds a plain LoRA adapter in safetensors."""
    if not (folder / CONFIG).is_file():
        fail(folder, f"no {CONFIG}", "a folder that peft wrote")
    with one_line(str(folder)):
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    if not isinstance(given, dict):
        fail(folder / CONFIG, type(given).__name__, "an object")
    for field, plain in PLAIN.items():
        if given.get(field, plain[-1]) not in plain:
            fail(folder, f"{field} = {given[field]!r}", "a plain LoRA adapter")
    if not (folder / WEIGHTS).is_file():
        fail(folder, f"no {WEIGHTS}", "weights in safetensors")


def _check_touches(adapted: Any, folder: Path) -> None:
    """Raises ValueError unless the adapter is on some query, key or value."""
    model = adapted.get_base_model()
    places = [(layer, name) for layer in find_layers(model) for name in NAMES]
    if not any(projection(model, layer, name).b is not None for layer, name in places):
        fail(folder, "an adapter of other modules", "one of query, key or value")


def random_adapter(model: Any, seed: int = 0) -> Any:
    """The model with a random adapter on query and value, rank 4, alpha = 4.

    On all three where they are fused. Gaussian halves, sharing evenly the factor that makes
    ||s B A||_F = 0.02 ||W||_F: the size of a trained adapter's.
    """
    import peft
    import torch

    layers = find_layers(model)
    targets = sorted({layer.projections[name] for layer in layers for name in ("query", "value")})
    # The fused projections are Conv1D, which holds (in, out).
    turned = any(layer.fused for layer in layers)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, fan_in_fan_out=turned)
    adapted = peft.get_peft_model(model, config)
    random = np.random.default_rng(seed)
    modules = dict(adapted.get_base_model().named_modules())
    for path in targets:
        half_a = modules[path].lora_A["default"].weight
        half_b = modules[path].lora_B["default"].weight
        a = random.standard_normal(half_b.shape)
        b = random.standard_normal(half_a.shape)
        size = float(modules[path].base_layer.weight.norm())
        # peft scales by alpha / rank = 1.
        factor = np.sqrt(UPDATE * size / max(np.linalg.norm(a @ b), 1e-30))
        with torch.no_grad():
            half_b.copy_(torch.as_tensor(factor * a))
            half_a.copy_(torch.as_tensor(factor * b))
    return adapted.eval()


def projection(model: Any, layer: Layer, name: str) -> Projection:
    """The weight, bias and adapter of one of a layer's projections, without the others fused to it.

    model: the base model, adapted in place or not.
    Raises ValueError for more than one adapter on a module, and for a fused projection that is not
    three equal parts (keys shared by heads).
    """
    module = model.get_submodule(layer.projections[name])
    base = getattr(module, "base_layer", module)
    weight = _numpy(base.weight)
    # The linear layers of torch hold (out, in).
    if type(base).__name__ != "Conv1D":
        weight = weight.T
    bias = None if getattr(base, "bias", None) is None else _numpy(base.bias)
    b = a = None
    scale = 1.0
    held = list(getattr(module, "lora_A", {}))
    if len(held) > 1:
        fail(layer.projections[name], f"adapters {held}", "one")
    if held:
        b = _numpy(module.lora_A[held[0]].weight).T
        a = _numpy(module.lora_B[held[0]].weight).T
        scale = float(module.scaling[held[0]])
    if layer.fused:
        d_model, columns = weight.shape
        if columns != 3 * d_model:
            got = f"a fused projection of {columns} columns"
            fail(layer.projections[name], got, f"query, key and value of {d_model} each")
        width = columns // 3
        first = NAMES.index(name) * width
        own = slice(first, first + width)
        weight = weight[:, own]
        bias = None if bias is None else bias[own]
        a = None if a is None else a[:, own]
    return Projection(weight, bias, b, a, scale)


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def join(heads: Sequence[Adapter], d_model: int) -> Adapter:
    """The adapter of a projection from those of its heads, in order: b shared, a side by side.

    For a fused projection: the heads of query, then key, then value. d_model: the rows of b that
    peft holds; one more is the row of a bias, which peft has no place for.
    Raises ValueError for heads that do not share b, and for an update of the bias.
    """
    b = np.asarray(heads[0].b)
    if not all(np.array_equal(np.asarray(head.b), b) for head in heads):
        fail("adapters", "heads with different b", "one b that they share")
    if np.any(b[d_model:]):
        fail("adapters", "an update of the bias", "zeros in the last row of b")
    a = np.concatenate([np.asarray(head.a) for head in heads], axis=1)
    return Adapter(a, b[:d_model])


def write_adapter(adapted: Any, halves: Mapping[str, Adapter], folder: Path) -> None:
    """Puts adapters into a peft model, by the path of their module; peft writes it to the folder.

    Raises ValueError for a module without an adapter, and for shapes that are not its own.
    """
    import torch

    modules = dict(adapted.get_base_model().named_modules())
    for path, adapter in halves.items():
        module = modules.get(path)
        if module is None or not hasattr(module, "lora_A"):
            fail(path, "a module without an adapter", "one that peft adapted")
        # peft names adapters; a module read by `projection` has one.
        (name,) = module.lora_A
        halves_of = (
            (module.lora_A[name].weight, adapter.b),
            (module.lora_B[name].weight, adapter.a),
        )
        for half, value in halves_of:
            new = torch.as_tensor(np.array(value, np.float32).T)
            if half.shape != new.shape:
                fail(path, f"shape {tuple(new.shape)}", tuple(half.shape))
            with torch.no_grad():
                half.copy_(new)
    adapted.save_pretrained(folder, save_embedding_layers=False)
