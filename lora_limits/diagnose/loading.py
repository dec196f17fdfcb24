"""A model folder, its tokenizer and windows of a text; whatever does not fit is refused by a
ValueError of one line.
"""

# the extra may be absent where the types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

EXTRA = ("torch", "transformers", "tokenizers", "peft")
INSTALL = "pip install 'lora-limits[models]'"
LONGEST = 2048  # tokens of a window where no length is named
SHORTEST = 16
# What a checkpoint may lack: heads and poolers, never a layer or an embedding.
NEEDED = re.compile(r"\.\d+\.|embed")


def require_extra() -> None:
    """Imports what the extra `models` brings. Raises ValueError, with the command that installs it,
    where it lacks.
    """
    missing = []
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(f"packages: {', '.join(missing)} missing, install them with: {INSTALL}")


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns whatever the libraries raise on a bad folder into a ValueError that names it, on one
    line.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error
    except Exception as error:  # a damaged folder raises whatever its format's reader likes
        raise ValueError(f"{what}: {type(error).__name__}, {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a folder. Raises ValueError: no folder, no config, quantised, encoder-decoder,
    pickle only.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: got no such folder, expected a local Hugging Face model folder"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: got a folder without config.json, expected a Hugging Face model folder"
        )
    with one_line(f"{folder / 'config.json'}"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(
            f"{folder / 'config.json'}: got {type(config).__name__}, expected an object"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder}: got quantised weights (quantization_config), expected float weights"
        )
    if config.get("is_encoder_decoder"):
        raise ValueError(
            f"{folder}: got an encoder-decoder, expected a model with self-attention only"
        )
    if not list(folder.glob("*.safetensors")):
        other = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")
        )
        got = f"weights in {', '.join(other)} only" if other else "no weights"
        raise ValueError(
            f"{folder}: got {got}, expected safetensors (pickled weights can run code)"
        )
    return config


def load_model(folder: Path) -> Any:
    """The model in float32, evaluation mode, its own eager attention, from local safetensors only.

    The class is the one that the folder's config names, so that adapters trained on it find their
    modules.
    Raises ValueError as `check_folder` does, and for weights that cannot be read or leave a layer
    without values.
    """
    config = check_folder(folder)
    require_extra()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = config.get("architectures") or ["AutoModel"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(
            f"{folder}: got architecture {names[0]}, expected one that transformers knows"
        )
    with one_line(str(folder)):
        model, info = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    absent = sorted(name for name in info["missing_keys"] if NEEDED.search(name))
    if absent:
        raise ValueError(
            f"{folder}: got no values for {absent[0]} ({len(absent)} such), expected all of {names[0]}"
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ValueError where there is none, it cannot be read or is not a
    fast one.
    """
    import transformers

    with one_line(f"{folder}: tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, use_fast=True
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: got {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json)"
        )
    return tokenizer


def longest_window(model: Any, tokenizer: Any = None) -> int:
    """The most tokens that the model takes at once, and its tokenizer gives; LONGEST where none is
    named.
    """
    config = model.config
    limits = [
        getattr(config, name, None)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len")
    ]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min((int(n) for n in limits if isinstance(n, int) and 0 < n < 10**9), default=LONGEST)


def windows(
    model: Any, tokenizer: Any, text: str, *, length: int | None, batch: int | None
) -> np.ndarray:
    """Token ids (windows, length): consecutive pieces of the text, each as the model would see it,
    special tokens in.

    The model never attends across windows, so nor does the diagnosis: each window is one data point
    of its own.
    length None: the model's longest window, at most LONGEST, or the whole text where that is
    shorter; batch None: 4 windows, or as many as the text fills. Raises ValueError for a text
    shorter than what is asked, or than SHORTEST tokens, and for a length that the model does not
    take.
    """
    most = longest_window(model, tokenizer)
    if length is not None and not SHORTEST <= length <= most:
        raise ValueError(
            f"--length: got {length}, expected {SHORTEST} to {most}, the model's longest window"
        )
    with one_line("--text"):
        whole = len(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])
    wanted = length or min(most, LONGEST, whole)
    if whole < max(wanted, SHORTEST):
        raise ValueError(f"--text: got {whole} tokens, expected at least {max(wanted, SHORTEST)}")
    with one_line("--text"):
        pieces = tokenizer(
            text,
            truncation=True,
            max_length=wanted,
            padding=False,
            return_overflowing_tokens=True,
            stride=0,
        )["input_ids"]
    full = [ids for ids in pieces if len(ids) == wanted]
    if len(full) < (batch or 1):
        raise ValueError(
            f"--text: got {len(full)} windows of {wanted} tokens, expected {batch or 1}"
        )
    ids = np.asarray(full[: batch or 4])
    rows = model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        raise ValueError(
            f"tokenizer: got token {ids.max()}, expected fewer than the model's {rows}"
        )
    return ids
