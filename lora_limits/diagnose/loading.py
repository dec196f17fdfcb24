"""A model folder, its tokenizer and windows of a text, or one line on what does not fit."""

# The extra may be absent where the types are checked.
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
from jaxtyping import Int

from lora_limits.checks import fail

EXTRA = ("torch", "transformers", "tokenizers", "peft")
INSTALL = "pip install 'lora-limits[models]'"
LONGEST = 2048  # tokens of a window where no length is named
SHORTEST = 16
WINDOWS = 4  # where no number is named
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5")
# What a checkpoint may lack: heads and poolers, never a layer or an embedding.
NEEDED = re.compile(r"\.\d+\.|embed")


def require_extra() -> None:
    """Imports what the extra `models` brings.

    Raises ValueError, with the command that installs it, where something of it is missing.
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
    """Turns whatever the libraries raise on a bad folder into a ValueError of one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error
    except Exception as error:
        # A damaged folder raises whatever its format's reader likes.
        raise ValueError(f"{what}: {type(error).__name__}, {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a folder that holds a model.

    Raises ValueError: no folder, no config, quantised, encoder-decoder, pickled weights only.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        fail(folder, "no such folder", "a local Hugging Face model folder")
    if not path.is_file():
        fail(folder, "a folder without config.json", "a Hugging Face model folder")
    with one_line(str(path)):
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(config, dict):
        fail(path, type(config).__name__, "an object")
    if config.get("quantization_config"):
        fail(folder, "quantised weights (quantization_config)", "float weights")
    if config.get("is_encoder_decoder"):
        fail(folder, "an encoder-decoder", "a model with self-attention only")
    if not list(folder.glob("*.safetensors")):
        other = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        got = f"weights in {', '.join(other)} only" if other else "no weights"
        fail(folder, got, "safetensors (pickled weights can run code)")
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
        fail(folder, f"architecture {names[0]}", "one that transformers knows")
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
        got = f"no values for {absent[0]} ({len(absent)} such)"
        fail(folder, got, f"all of {names[0]}")
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ValueError unless it can be read and is a fast one."""
    import transformers

    with one_line(f"{folder}: tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, use_fast=True
        )
    if not tokenizer.is_fast:
        fail(folder, type(tokenizer).__name__, "a fast tokenizer (tokenizer.json)")
    return tokenizer


def longest_window(model: Any, tokenizer: Any = None) -> int:
    """The most tokens that the model takes and its tokenizer gives at once; LONGEST if unnamed."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [getattr(model.config, name, None) for name in names]
    limits.append(getattr(tokenizer, "model_max_length", None))
    # Tokenizers without a limit say 10^30.
    named = [int(n) for n in limits if isinstance(n, int) and 0 < n < 10**9]
    return min(named, default=LONGEST)


def windows(
    model: Any, tokenizer: Any, text: str, *, length: int | None, batch: int | None
) -> Int[np.ndarray, "windows l"]:
    """Token ids of consecutive pieces of the text, as the model sees them, special tokens in.

    The model never attends across windows, so nor does the diagnosis: each window is one data point
    of its own. length None: the model's longest window, at most LONGEST, or the whole text where
    that is shorter; batch None: WINDOWS of them, or as many as the text fills.
    Raises ValueError for a text shorter than what is asked, or than SHORTEST tokens, and for a
    length that the model does not take.
    """
    most = longest_window(model, tokenizer)
    if length is not None and not SHORTEST <= length <= most:
        fail("--length", length, f"{SHORTEST} to {most}, the model's longest window")
    with one_line("--text"):
        whole = len(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])
    wanted = length or min(most, LONGEST, whole)
    least = max(wanted, SHORTEST)
    if whole < least:
        fail("--text", f"{whole} tokens", f"at least {least}")
    with one_line("--text"):
        pieces = tokenizer(
            text,
            truncation=True,
            max_length=wanted,
            padding=False,
            return_overflowing_tokens=True,
            stride=0,
        )["input_ids"]
    # The last piece is what is left.
    full = [ids for ids in pieces if len(ids) == wanted]
    if len(full) < (batch or 1):
        fail("--text", f"{len(full)} windows of {wanted} tokens", batch or 1)
    ids = np.asarray(full[: batch or WINDOWS])
    rows = model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        fail("tokenizer", f"token {ids.max()}", f"fewer than the model's {rows}")
    return ids
