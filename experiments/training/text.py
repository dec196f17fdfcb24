"""Text that every Python brings along: prose and code of its standard library, as bytes or as
frequent words.
"""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path
from pydoc_data import topics as reference

import numpy as np

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
BYTES = 128  # ASCII; what lies outside it becomes "?"
WORD = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)
LARGEST = 60_000  # bytes of a file: parsing is most of the time that reading takes


def is_test(name: str) -> bool:
    """Whether a document is held out: one in five, by its name alone."""
    return zlib.crc32(name.encode()) % 5 == 0


@functools.cache
def package(name: str) -> dict[str, str]:
    """The source files of a standard package, {path: text}."""
    return {str(p.relative_to(LIBRARY)): _read(p) for p in sorted((LIBRARY / name).rglob("*.py"))}


@functools.cache
def topics() -> dict[str, str]:
    """The language reference that pydoc carries, {topic: text}."""
    return {name: text for name, text in sorted(reference.topics.items()) if isinstance(text, str)}


@functools.cache
def modules() -> tuple[dict[str, str], dict[str, str]]:
    """(docstrings, code without docstrings and comments) of the standard modules, {file: text}
    each.
    """
    prose = {}
    code = {}
    for path in sorted(LIBRARY.glob("*.py")):
        if path.stat().st_size <= LARGEST:
            prose[path.name], code[path.name] = _divide(_read(path))
    return prose, code


@functools.cache
def fingerprint() -> str:
    """16 hexadecimal digits of SHA-256 over all the texts here, which differ with the Python."""
    everything = [topics(), modules(), *(package(name) for name in PACKAGES)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> str:
    """The docstrings of a source file."""
    return _divide(source)[0]


def _divide(source: str) -> tuple[str, str]:
    """(docstrings, what is left without them and without lines that only comment or are empty)."""
    lines = source.splitlines()
    strings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            strings.append(ast.get_docstring(node))
            first = node.body[0]
            last = first.end_lineno or first.lineno
            lines[first.lineno - 1 : last] = [""] * (last - first.lineno + 1)
    kept = (line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return "\n\n".join(strings), "\n".join(kept)


def letters(text: str) -> str:
    """Lower-case letters alone, one space between words."""
    return re.sub("[^a-z]+", " ", text.lower())


class Vocabulary:
    """ASCII bytes, and with `size` above 128 the most frequent words of some texts, each with the
    space before it.
    """

    def __init__(self, texts: Iterable[str] = (), size: int = BYTES):
        counts = collections.Counter(
            word for text in texts for word in WORD.findall(text) if len(word) > 2
        )
        # By the bytes that a word saves; ties by name, so that every run has the same vocabulary.
        ranked = sorted(counts, key=lambda word: (-counts[word] * len(word), word))
        self.words = {word: BYTES + n for n, word in enumerate(ranked[: size - BYTES])}
        self.size = size

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, (n,) int32: the longest known word, else byte by byte."""
        text = text.encode("ascii", "replace").decode()
        if not self.words:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        out: list[int] = []
        for word in WORD.findall(text):
            known = self.words.get(word)
            out += [known] if known is not None else list(word.encode())
        return np.array(out, np.int32)


@functools.cache
def vocabulary(size: int) -> Vocabulary:
    """That of the language reference and of the packages' sources, less the documents held out."""
    documents = [topics(), *(package(name) for name in PACKAGES)]
    return Vocabulary(
        (text for d in documents for name, text in d.items() if not is_test(name)), size
    )


def windows(texts: Iterable[str], length: int, vocabulary: Vocabulary) -> np.ndarray:
    """Every text cut into windows of `length` tokens that do not overlap, the rest dropped: (n,
    length).
    """
    rows = [vocabulary.encode(text) for text in texts]
    cut = [row[: len(row) // length * length].reshape(-1, length) for row in rows]
    return np.concatenate([np.zeros((0, length), np.int32), *cut])
