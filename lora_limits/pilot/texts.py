"""A user's text, with labels or without, as token ids of one length, a fifth of them held out."""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lora_limits.checks import fail
from lora_limits.training.batches import Data

SHORTEST = 16  # tokens: below, there is nothing to approximate
LONGEST = 2048  # tokens where no length is named
HELD_OUT = 5  # one part in so many, the last: neighbours in a text are alike
FEWEST = 2  # windows of either part


class Task(NamedTuple):
    """classes: None where the next token is predicted. left_out: lines shorter than the length."""

    train: Data
    test: Data
    classes: tuple[str, ...] | None = None
    left_out: int = 0

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.train.tokens.shape[1]


def read(path: Path) -> str:
    """The text of a file. Raises ValueError unless it is UTF-8, OSError where it cannot be read."""
    try:
        # A byte order mark would become a token, in silence.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: got {error.reason} at byte {error.start}, expected UTF-8"
        ) from None


def tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder, which neither cuts nor pads.

    Raises ValueError where there is none that can be read.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        fail(folder, "no tokenizer.json", "one (save_pretrained of a fast tokenizer writes it)")
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exceptions.
        raise ValueError(f"{path}: got {error}, expected a tokenizer") from None
    found.no_truncation()
    found.no_padding()
    return found


def language(ids: Sequence[int] | np.ndarray, length: int | None, most: int) -> Task:
    """Consecutive windows of a text's tokens, labelled by their next tokens; the last ones held out.

    length None: `most`, at most LONGEST.
    Raises ValueError for a text of too few windows.
    """
    length = length or min(most, LONGEST)
    tokens = np.asarray(ids, np.int32)
    count = max(len(tokens) - 1, 0) // length
    cut = tokens[: count * length].reshape(count, length)
    following = tokens[1 : count * length + 1].reshape(count, length)
    held = _held_out(count, f"{len(tokens)} tokens, {count} windows of {length}")
    return Task(
        Data(cut[: count - held], following[: count - held]),
        Data(cut[count - held :], following[count - held :]),
    )


def classes(
    tokenizer: Any, lines: Sequence[str], labels: Sequence[str], length: int | None, most: int
) -> Task:
    """The lines that are long enough, cut to one length, each with its class; of each class the last
    ones held out.

    Nothing is padded. length None: what half of the lines have, at most `most`.
    Raises ValueError for numbers of lines and labels that differ, a single class, and classes of
    too few lines that are long enough.
    """
    if len(lines) != len(labels):
        fail("--labels", f"{len(labels)} lines", f"{len(lines)}, one for each line of --text")
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        fail("--labels", f"{len(names)} classes", "at least 2")
    tokenizer.enable_truncation(most)
    lengths = [len(row.ids) for row in tokenizer.encode_batch(list(lines))]
    length = length or int(np.median(lengths))
    # Cut by the tokenizer, so that special tokens stay where they belong.
    tokenizer.enable_truncation(length)
    rows = [row.ids for row in tokenizer.encode_batch(list(lines))]
    parts: tuple[list[Data], list[Data]] = [], []
    for n, name in enumerate(names):
        own = [row for row, of in zip(rows, labels, strict=True) if of == name]
        own = np.asarray([row for row in own if len(row) == length], np.int32)
        held = _held_out(len(own), f"{len(own)} lines of {length} tokens of class {name!r}")
        for part, cut in zip(parts, np.split(own, [len(own) - held]), strict=True):
            part.append(Data(cut, np.full(len(cut), n, np.int32)))
    left_out = sum(len(row) < length for row in rows)
    train, test = (_mixed(part) for part in parts)
    return Task(train, test, names, left_out)


def _held_out(count: int, got: str) -> int:
    """How many of so many windows are held out. Raises ValueError for too few."""
    held = -(-count // HELD_OUT)
    if held < FEWEST or count - held < FEWEST:
        fail("--text", got, f"at least {HELD_OUT + 1} (or a shorter --length)")
    return held


def _mixed(parts: Sequence[Data]) -> Data:
    """All classes in an order in which any first few are of every class."""
    tokens: Int[np.ndarray, "n l"] = np.concatenate([part.tokens for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    order = np.random.default_rng(0).permutation(len(labels))
    return Data(tokens[order], labels[order])
