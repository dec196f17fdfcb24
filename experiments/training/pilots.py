"""What pilots of the experiment start from: a small decoder made here, all-MiniLM-L6-v2, SmolLM2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from experiments import Refused
from experiments.runner import store
from experiments.training import text
from lora_limits.nn.layered import Layered
from lora_limits.nn.llama import Llama, Sizes
from lora_limits.nn.lora import LoRA
from lora_limits.pilot import models, texts
from lora_limits.pilot.texts import Task
from lora_limits.training import checkpoints, loop
from lora_limits.training.loop import Recipe

VERSION = 1  # bump when pretraining would give other numbers
SIZES = Sizes(
    vocabulary=text.BYTES, d_model=64, heads=8, key_heads=4, width=8, layers=2, mlp=128, length=8192
)
CHARACTERS = 4  # of a piece of source, for each token
PRETRAINED = 256  # tokens of a window that the small decoder is pretrained on
POSITIONS = {"made": SIZES.length, "minilm": 512, "smollm2": 8192}


def task(name: str, length: int, folder: Path) -> Task:
    """The next byte of code for the small decoder, the next token of the language reference for
    SmolLM2, and for MiniLM the package that a piece of source comes from.

    Raises Refused where the model's folder is not there.
    """
    if name == "made":
        code = "\n\n".join(text.modules()[1].values())
        return texts.language(text.Vocabulary().encode(code), length, SIZES.length)
    _check(name, folder)
    tokenizer = texts.tokenizer(folder)
    if name == "smollm2":
        words = "\n\n".join(text.topics().values())
        ids = tokenizer.encode(words, add_special_tokens=False).ids
        return texts.language(ids, length, POSITIONS[name])
    lines, labels = _sources(length)
    return texts.classes(tokenizer, lines, labels, length, POSITIONS[name])


def _check(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise Refused(
            f"{name}: got no model in {str(folder)!r}, expected its folder (--{name} DIR)"
        )


def _sources(length: int) -> tuple[list[str], list[str]]:
    """(pieces of source, documentation and code, the standard package that each comes from)."""
    # More characters than a token has: nearly every piece is long enough, and no other is used.
    size = CHARACTERS * length
    lines, labels = [], []
    for package in text.PACKAGES:
        words = " ".join(" ".join(source.split()) for source in text.package(package).values())
        pieces = [words[n : n + size] for n in range(0, len(words), size)]
        lines += pieces
        labels += [package] * len(pieces)
    return lines, labels


def loader(
    name: str, folder: Path, lora: LoRA, classes: int | None, cache: Path, pretraining: int
) -> Callable[[int], Layered]:
    """(seed) -> the model with fresh adapters. pretraining: steps of the small decoder's."""
    if name == "made":
        return functools.partial(_made, lora, cache, pretraining)
    return functools.partial(models.load, folder, lora, classes, loop.EXACT)


def _made(lora: LoRA, cache: Path, steps: int, seed: int) -> Llama:
    """The small decoder, pretrained on prose once and kept under `cache`, by content."""
    told: dict[str, Any] = {"sizes": vars(SIZES), "steps": steps, "text": text.fingerprint()}
    folder = cache / store.key("made", VERSION, {}, told)
    if not folder.exists():
        checkpoints.publish(folder, _pretrain(steps))
    model = Llama(SIZES, lora, loop.EXACT, rngs=nnx.Rngs(seed))
    # Restored even when just made: every run starts from the bytes that were kept.
    nnx.update(model, checkpoints.restore(folder, nnx.state(model, loop.BASE), {})[1])
    return model


def _pretrain(steps: int) -> Any:
    """Parameters of the base after training on the language reference, byte by byte."""
    model = Llama(SIZES, LoRA(), loop.EXACT, rngs=nnx.Rngs(0))
    prose = text.Vocabulary().encode("\n\n".join(text.topics().values()))
    source = texts.language(prose, PRETRAINED, SIZES.length)
    loop.train(model, source, Recipe(steps, rate=3e-3, every=steps, tests=16), what=loop.BASE)
    return nnx.state(model, loop.BASE)
