"""Tasks on real data that no one has to download: digits as pixels, and text of Python's standard
library.

Each task has two parts: a base is pretrained on "source" and fine-tuned, its adapters alone, on
"target".

    digits         images of digits (scikit-learn), pixel by pixel     17 greys        black and white
    prose_or_code  prose or code                                       as it stands    letters alone, other documents
    which_module   the package that a window of source comes from      as it stands    letters alone
    next_byte      the next byte (or word)                             prose           code

Held out are one in five documents, or images: never a piece of what is trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.training import text
from lora_limits.training.batches import Data

NAMES = ("digits", "prose_or_code", "which_module", "next_byte")
PARTS = ("source", "target")
GREYS = 17
# Tokens of a window: what polynomials in blocks need, and what both parts of every text have.
SHORTEST, LONGEST = 4, 8192
MOST = 4096  # windows of one class to train on, a quarter of that to test


class Task(NamedTuple):
    """classes: None where the next token is predicted."""

    vocabulary: int
    classes: int | None
    train: Data
    test: Data


def check_length(name: str, length: int) -> None:
    """Raises ValueError for a length at which a task cannot be loaded."""
    if name == "digits":
        _pixels(length)
    elif not SHORTEST <= length <= LONGEST:
        expected = f"{SHORTEST} to {LONGEST}, for the texts are no longer"
        raise ValueError(f"length of {name}: got {length}, expected {expected}")


@functools.cache
def load(name: str, length: int, part: str, words: int = 0) -> Task:
    """One part of a task in sequences of `length` tokens.

    words: 0 for bytes, else the size of the vocabulary (bytes and the most frequent words; text
    tasks only).
    Digits need a length of 64 n^2: each pixel is interpolated to n x n. The same arguments give the
    same arrays under one version of Python. Raises ValueError for an unknown task or part, and a
    length or vocabulary that does not fit.
    """
    if name not in NAMES or part not in PARTS:
        raise ValueError(
            f"task: got {name!r}, {part!r}, expected one of {list(NAMES)} and of {list(PARTS)}"
        )
    if name == "digits":
        return _digits(length, part)
    if words and words <= text.BYTES:
        raise ValueError(f"words: got {words}, expected 0 or more than {text.BYTES}")
    vocabulary = text.vocabulary(words) if words else text.Vocabulary()
    makers: dict[str, Any] = {
        "prose_or_code": _prose_or_code,
        "which_module": _which_module,
        "next_byte": _next_byte,
    }
    return makers[name](length, part, vocabulary)


def inputs(names: Iterable[str]) -> dict[str, Any]:
    """What tasks read beside their arguments: the hash of the texts, where any of them reads one."""
    return {"text": text.fingerprint()} if set(names) - {"digits"} else {}


def _pixels(length: int) -> int:
    """Along a side, for each pixel of an image. Raises ValueError unless the length is 64 n^2."""
    factor = round((length / 64) ** 0.5)
    if factor < 1 or 64 * factor**2 != length:
        raise ValueError(f"length of digits: got {length}, expected 64 n^2")
    return factor


def _digits(length: int, part: str) -> Task:
    # Here, for they take longer to import than the other tasks take to load.
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    factor = _pixels(length)
    bunch: Any = load_digits()
    images: Any = np.asarray(bunch.images)
    if factor > 1:
        images = zoom(images, (1, factor, factor), order=1, grid_mode=True, mode="nearest")
    tokens = np.rint(images).astype(np.int32).reshape(len(images), -1)
    if part == "target":
        tokens = (GREYS - 1) * (tokens > GREYS // 2).astype(np.int32)
    # By number, so that the same images are held out in both parts.
    held = np.arange(len(tokens)) % 5 == 0
    labels = np.asarray(bunch.target, np.int32)
    return Task(GREYS, 10, Data(tokens[~held], labels[~held]), Data(tokens[held], labels[held]))


def _classes(documents: list[dict[str, str]], length: int, vocabulary: text.Vocabulary) -> Task:
    """A task from the documents of each class, as many windows of one as of another."""
    parts = []
    for held in (False, True):
        cut = [
            text.windows(
                (t for name, t in d.items() if text.is_test(name) == held), length, vocabulary
            )
            for d in documents
        ]
        count = min(MOST // (4 if held else 1), *(len(windows) for windows in cut))
        if count == 0:
            raise ValueError(
                f"length: got {length}, expected one at which every class has a window"
            )
        picked = [
            np.random.default_rng(n).permutation(windows)[:count] for n, windows in enumerate(cut)
        ]
        labels = np.repeat(np.arange(len(cut), dtype=np.int32), count)
        order = np.random.default_rng(0).permutation(
            len(labels)
        )  # so that any first few are of every class
        parts.append(Data(np.concatenate(picked)[order], labels[order]))
    return Task(vocabulary.size, len(documents), *parts)


def _prose_or_code(length: int, part: str, vocabulary: text.Vocabulary) -> Task:
    prose, code = text.modules()
    if part == "source":
        return _classes([text.topics(), code], length, vocabulary)
    return _classes(
        [{n: text.letters(t) for n, t in d.items()} for d in (prose, code)], length, vocabulary
    )


def _which_module(length: int, part: str, vocabulary: text.Vocabulary) -> Task:
    documents = [text.package(name) for name in text.PACKAGES]
    if part == "target":
        documents = [{n: text.letters(t) for n, t in d.items()} for d in documents]
    return _classes(documents, length, vocabulary)


def _next_byte(length: int, part: str, vocabulary: text.Vocabulary) -> Task:
    documents = text.topics() if part == "source" else text.modules()[1]
    # A window more than the length, for the labels are the tokens shifted by one.
    task = _classes([documents], length + 1, vocabulary)
    train, test = (Data(d.tokens[:, :-1], d.tokens[:, 1:]) for d in (task.train, task.test))
    return Task(vocabulary.size, None, train, test)
