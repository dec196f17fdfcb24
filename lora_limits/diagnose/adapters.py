"""LoRA adapters as peft reads and writes them: which are plain LoRA, and whose they are."""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_limits.checks import fail
from lora_limits.diagnose.layers import NAMES, find_places
from lora_limits.diagnose.loading import ADAPTER, check_finite, one_line
from lora_limits.problem import Adapter

WEIGHTS = "adapter_model.safetensors"
RANK = 4  # of the random adapter
UPDATE = 0.02  # its update's Frobenius norm beside its weight's
# Fields of peft's LoraConfig that change what an adapter of attention is, and the values with which
# it is plain LoRA, the last of them where nothing is said. What is saved or trained elsewhere
# (classifiers, embeddings, tokens) is a part of the model.
PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    # The others change the frozen weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica", None),
}


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter in the folder on it, a peft model.

    Raises ValueError for a folder that peft cannot read, an adapter that is not plain LoRA (DoRA,
    trained biases, whole attention modules), pickled weights, weights that are not finite, and
    modules or shapes that are not this model's.
    """
    _check_folder(folder)
    import peft
    from safetensors import safe_open

    with one_line(f"{folder}: adapter of another model?"):
        with safe_open(folder / WEIGHTS, "np") as file:
            saved = set(file.keys())
        # On a model whose modules do not fit this raises, and changes nothing.
        adapted = peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
    # peft passes over what the model has no place for. Whole embeddings are saved or not.
    kinds = (False, True)
    held = [set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=k)) for k in kinds]
    if saved not in held:
        name = min(saved ^ held[0])
        raise ValueError(
            f"{folder}: got an adapter of another model, {name} is in one of them only"
        )
    _check_touches(adapted, folder)
    check_finite(folder, adapted)
    return adapted.eval()


def _check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder holds a plain LoRA adapter in safetensors."""
    given = _config(folder)
    for field, plain in PLAIN.items():
        if given.get(field, plain[-1]) not in plain:
            fail(folder, f"{field} = {given[field]!r}", "a plain LoRA adapter")
    if not (folder / WEIGHTS).is_file():
        fail(folder, f"no {WEIGHTS}", "weights in safetensors")


def _config(folder: Path) -> dict[str, Any]:
    """What peft says of the adapter in a folder."""
    if not (folder / ADAPTER).is_file():
        fail(folder, f"no {ADAPTER}", "a folder that peft wrote")
    with one_line(str(folder)):
        given = json.loads((folder / ADAPTER).read_text(encoding="utf-8-sig"))
    if not isinstance(given, dict):
        fail(folder / ADAPTER, type(given).__name__, "an object")
    return given


def _check_touches(adapted: Any, folder: Path) -> None:
    """Raises ValueError unless the adapter is on some query, key or value, and on parts of it."""
    model = adapted.get_base_model()
    modules = dict(model.named_modules())
    places = find_places(model)
    paths = {place.projections[name] for place in places for name in NAMES}
    whole = [p for p in paths if "modules_to_save" in p or hasattr(modules[p], "modules_to_save")]
    if whole:
        fail(folder, f"modules_to_save = {min(whole)}", "a plain LoRA adapter of attention")
    if not any(getattr(modules[path], "lora_A", {}) for path in paths):
        fail(folder, "an adapter of other modules", "one of query, key or value")


def check_base(folder: Path, model: Any, model_folder: Path) -> str | None:
    """Whose adapter it is, in a sentence, where its base cannot be known to be this model.

    peft writes down the base by name or path, and where no task is named its class.
    Raises ValueError where that is another kind of model, whatever the shapes.
    """
    given = _config(folder)
    base = given.get("base_model_name_or_path")
    cls = (given.get("auto_mapping") or {}).get("base_model_class")
    kind = model.config.model_type
    edit = f"if it is this model, edit base_model_name_or_path in {folder / ADAPTER}"
    if cls and cls != type(model).__name__ and _family(cls) != _family(type(model).__name__):
        fail(folder, f"an adapter of a {cls}", f"one of a {type(model).__name__}")
    if not base or Path(base).name == model_folder.resolve().name:
        return None
    other = Path(base) / "config.json"
    if other.is_file():
        if other.parent.resolve() == model_folder.resolve():
            return None
        with one_line(str(other)):
            theirs = json.loads(other.read_text(encoding="utf-8-sig")).get("model_type")
    else:
        theirs = _named_family(base, kind)
    if theirs is not None and theirs != kind:
        fail(folder, f"an adapter of {base}, a {theirs}", f"one of a {kind}; {edit}")
    return f"The adapter names {base} as its base; that this model is the same is taken on trust."


def _family(name: str) -> str:
    """A class name without its task: LlamaForCausalLM and LlamaModel are of one family."""
    return re.sub(r"(For[A-Z]\w*|Model|LMHeadModel)$", "", name)


def _named_family(base: str, kind: str) -> str | None:
    """The longest kind of model that a name of a base contains; None where this kind is in it.

    None too where no kind is: names are free.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    def letters(word: str) -> str:
        return re.sub("[^a-z]", "", word.lower())

    name = letters(Path(base).name)
    if letters(kind) in name:
        return None
    known = [k for k in MODEL_MAPPING_NAMES if len(letters(k)) > 3 and letters(k) in name]
    # Of llama and llama4, which are the same letters, the first.
    return max(known, key=lambda k: (len(letters(k)), -len(k)), default=None)


def random_adapter(model: Any, seed: int = 0) -> Any:
    """The model with a random adapter on query and value, rank 4, alpha = 4.

    On all three where they are fused. Gaussian halves, sharing evenly the factor that makes
    ||s B A||_F = 0.02 ||W||_F: the size of a trained adapter's.
    """
    import peft
    import torch

    places = find_places(model)
    targets = sorted({place.projections[name] for place in places for name in ("query", "value")})
    # GPT-2's Conv1D holds (in, out).
    turned = any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in targets)
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
