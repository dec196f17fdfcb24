"""Windows of a text, and labelled lines, as token ids of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lora_limits.checks import fail
from lora_limits.diagnose.loading import one_line

LONGEST = 2048  # tokens of a window where no length is named
SHORTEST = 16
WINDOWS = 4  # where no number is named


class Windows(NamedTuple):
    """Data points of one length, and the class of each where there are labels."""

    ids: Int[np.ndarray, "windows l"]
    labels: list[str] | None = None


def longest_window(model: Any, tokenizer: Any = None) -> int:
    """The most tokens that the model takes and its tokenizer gives at once; LONGEST if unnamed."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [getattr(model.config, name, None) for name in names]
    limits.append(getattr(tokenizer, "model_max_length", None))
    limits += _positions(model)
    # Tokenizers without a limit say 10^30.
    named = [int(n) for n in limits if isinstance(n, int) and 0 < n < 10**9]
    return min(named, default=LONGEST)


def _positions(model: Any) -> list[int]:
    """Rows of learned positions that tokens can have.

    Models of RoBERTa's kind count from the padding's row on, and the rows up to it stay unused.
    """
    return [
        module.num_embeddings - module.padding_idx - 1
        for path, module in model.named_modules()
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]


def _encode(tokenizer: Any, text: str | Sequence[str], **options: Any) -> Any:
    with one_line("--text"):
        return tokenizer(text, padding=False, **options)["input_ids"]


def _check_length(length: int | None, most: int) -> None:
    if length is not None and not SHORTEST <= length <= most:
        fail("--length", length, f"{SHORTEST} to {most}, the model's longest window")


def _check_known(model: Any, ids: np.ndarray) -> np.ndarray:
    """The ids. Raises ValueError for a token that the model has no embedding of."""
    rows = model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        fail("tokenizer", f"token {ids.max()}", f"fewer than the model's {rows}")
    return ids


def windows(
    model: Any, tokenizer: Any, text: str, *, length: int | None, batch: int | None
) -> Windows:
    """Consecutive pieces of the text, as the model sees them, special tokens in.

    The model never attends across windows, so nor does the diagnosis: each window is one data point
    of its own. length None: the model's longest window, at most LONGEST, or the whole text where
    that is shorter; batch None: WINDOWS of them, or as many as the text fills.
    Raises ValueError for a text shorter than what is asked, or than SHORTEST tokens, and for a
    length that the model does not take.
    """
    most = longest_window(model, tokenizer)
    _check_length(length, most)
    whole = len(_encode(tokenizer, text, truncation=False, verbose=False))
    wanted = length or min(most, LONGEST, whole)
    least = max(wanted, SHORTEST)
    if whole < least:
        fail("--text", f"{whole} tokens", f"at least {least}")
    pieces = _encode(
        tokenizer,
        text,
        truncation=True,
        max_length=wanted,
        return_overflowing_tokens=True,
        stride=0,
    )
    # The last piece is what is left.
    full = [ids for ids in pieces if len(ids) == wanted]
    if len(full) < (batch or 1):
        fail("--text", f"{len(full)} windows of {wanted} tokens", batch or 1)
    return Windows(_check_known(model, np.asarray(full[: batch or WINDOWS])))


def labelled(
    model: Any,
    tokenizer: Any,
    lines: Sequence[str],
    labels: Sequence[str],
    *,
    length: int | None,
    batch: int | None,
) -> Windows:
    """The first lines that are long enough, cut to one length, each with its class.

    Nothing is padded, since padding is no token of the task. length None: the most tokens that
    `batch` lines have. batch None: WINDOWS.
    Raises ValueError for numbers of lines and labels that differ, too few lines that are long
    enough, and a length that the model does not take.
    """
    most = longest_window(model, tokenizer)
    _check_length(length, most)
    if len(lines) != len(labels):
        fail("--labels", f"{len(labels)} lines", f"{len(lines)}, one for each line of --text")
    count = batch or min(WINDOWS, len(lines))
    rows = _encode(tokenizer, list(lines), truncation=True, max_length=most)
    lengths = sorted((len(row) for row in rows), reverse=True)
    wanted = length or (lengths[count - 1] if count <= len(lengths) else 0)
    held = [n for n, row in enumerate(rows) if len(row) >= max(wanted, SHORTEST)][:count]
    if len(held) < count:
        got = f"{len(held)} lines of {max(wanted, SHORTEST)} tokens or more"
        fail("--text", got, count)
    # Cut by the tokenizer, so that special tokens stay where they belong.
    cut = _encode(tokenizer, [lines[n] for n in held], truncation=True, max_length=wanted)
    return Windows(_check_known(model, np.asarray(cut)), [labels[n] for n in held])
