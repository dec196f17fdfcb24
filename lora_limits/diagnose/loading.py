"""A model folder and its tokenizer, or one line on what does not fit."""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_limits.checks import fail

EXTRA = ("torch", "transformers", "tokenizers", "peft")
INSTALL = "pip install 'lora-limits[models]'"
MOST_SAID = 500  # characters of a library's message
ADAPTER = "adapter_config.json"  # what peft writes, beside a model's own files where it is told to
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")  # files that one is read from
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5")
# What a checkpoint may lack: heads and poolers, never a layer or an embedding.
NEEDED = re.compile(r"\.\d+\.|embed")


def require_extra() -> None:
    """Looks for what the extra `models` brings, and imports none of it.

    Raises ValueError, with the command that installs it, where something of it is missing.
    """
    missing = [name for name in EXTRA if not _installed(name)]
    if missing:
        raise ValueError(f"packages: {', '.join(missing)} missing, install them with: {INSTALL}")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        # A module of that name is there and has no specification.
        return False


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns whatever the libraries raise on a bad folder into a ValueError of one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {_flat(error)}") from error
    except Exception as error:
        # A damaged folder raises whatever its format's reader likes.
        raise ValueError(f"{what}: {type(error).__name__}, {_flat(error)}") from error


def _flat(error: Exception) -> str:
    """The whole message in one line: what is wrong often stands in its last lines."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]} ..."


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a folder that holds a model.

    Raises ValueError: no folder, no config, quantised, encoder-decoder, pickled weights only.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        fail(folder, "no such folder", "a local Hugging Face model folder, downloaded beforehand")
    if not path.is_file():
        fail(folder, "a folder without config.json", "a Hugging Face model folder")
    with one_line(str(path)):
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(config, dict):
        fail(path, type(config).__name__, "an object")
    if _quantised(config):
        fail(folder, "quantised weights (quantization_config)", "float weights")
    if config.get("is_encoder_decoder"):
        fail(folder, "an encoder-decoder", "a model with self-attention only")
    if not list(folder.glob("*.safetensors")):
        other = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        got = f"weights in {', '.join(other)} only" if other else "no weights"
        fail(folder, got, "safetensors (pickled weights can run code)")
    return config


def _quantised(config: dict[str, Any]) -> bool:
    """Whether weights are quantised. What transformers read from a GGUF file and saved is floats."""
    given = config.get("quantization_config")
    return bool(given) and given.get("quant_method") != "gguf"


def load_model(folder: Path) -> Any:
    """The model in float32, evaluation mode, its own eager attention, from local safetensors only.

    The class is the one that the folder's config names, so that adapters trained on it find their
    modules. An adapter that lies in the folder is left alone: it is loaded when it is asked for.
    Raises ValueError as `check_folder` does, for a model that does not read tokens, and for weights
    that cannot be read, have other shapes, leave a layer without values or are not finite.
    """
    config = check_folder(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = _class_name(config)
    cls = getattr(transformers, name, None)
    if cls is None:
        fail(folder, f"architecture {name}", "one that transformers knows")
    _check_reads_tokens(cls, config)
    with one_line(str(folder)), _without_adapter(folder) as own:
        model, info = _read(cls, own)
    _check_complete(folder, name, info)
    check_finite(folder, model)
    return model.eval()


def _class_name(config: dict[str, Any]) -> str:
    """The class that a config names, or the bare model of its kind."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = str(config.get("model_type"))
    names = config.get("architectures") or MODEL_MAPPING_NAMES.get(kind, kind)
    return names if isinstance(names, str) else names[0]


def _read(cls: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of its weights."""
    import torch

    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    # Left over from a GGUF file, it would have floats taken for quantised weights.
    config.__dict__.pop("quantization_config", None)
    return cls.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        # Shapes that do not fit are refused here: transformers' own error does not name them.
        ignore_mismatched_sizes=True,
    )


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder, or where an adapter lies in it one of links to everything else.

    transformers would load the adapter together with the weights, without a word.
    """
    if not (folder / ADAPTER).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as own:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(own) / path.name).symlink_to(path.resolve())
        yield Path(own)


def _check_reads_tokens(cls: Any, config: dict[str, Any]) -> None:
    """Raises ValueError for models of images and sound."""
    reads = getattr(cls, "main_input_name", "input_ids")
    other = next((n for n in ("vision_config", "audio_config") if n in config), None)
    if other:
        fail(cls.__name__, f"a model with a {other}", "one of text alone")
    if reads != "input_ids":
        fail(cls.__name__, f"a model that reads {reads}", "one that reads tokens (input_ids)")


def _check_complete(folder: Path, name: str, info: dict[str, Any]) -> None:
    """Raises ValueError for tensors of another shape, and for layers or embeddings without values."""
    other: list[tuple[str, Any, Any]] = sorted(info.get("mismatched_keys") or ())
    if other:
        weight, saved, own = other[0]
        fail(f"{folder}: {weight}", f"shape {tuple(saved)}", f"{tuple(own)}, as config.json says")
    absent = sorted(key for key in info["missing_keys"] if NEEDED.search(key))
    if absent:
        fail(folder, f"no values for {absent[0]} ({len(absent)} such)", f"all of {name}")


def check_finite(folder: Path, model: Any) -> None:
    """Raises ValueError, with its name, for the first weight that is not finite."""
    import torch

    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            fail(f"{folder}: {name}", f"{count} entries that are not finite", "finite weights")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ValueError unless it can be read and is a fast one."""
    if not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        fail(folder, "no tokenizer", "tokenizer.json, as transformers' save_pretrained writes it")
    import transformers

    with one_line(f"{folder}: tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, use_fast=True
        )
    if not tokenizer.is_fast:
        fail(folder, type(tokenizer).__name__, "a fast tokenizer (tokenizer.json)")
    return tokenizer
