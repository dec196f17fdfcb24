"""Pilots of a small decoder made here and of real models: exact and approximate training side by
side, judged by a margin set beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from experiments.runner import store
from experiments.runner.config import Fields
from experiments.training import pilots, text
from lora_limits.pilot.course import Pilot
from lora_limits.pilot.settings import Settings, read_method

VERSION = 1
POINTS = ("pilots", "steps", "seeds", "batch", "rate")
PLACES = ("minilm", "smollm2", "cache")
SIZES = ("steps", "seeds", "batch")  # that a pilot may have of its own
KEPT = ("choice", "times", "start", "runs", "outcome")  # of a pilot's file, in its row


class Config(Fields):
    """A pilot: "MODEL LENGTH METHOD", the model made, minilm or smollm2; the method "polynomial
    DEGREE", "block tree" or "chosen", layer by layer. Steps, seeds and batch of one pilot alone
    come after semicolons: "smollm2 512 polynomial 2; steps 20; batch 2".

    pretraining: steps of the model that is made here. minilm, smollm2: folders of these models, as
    transformers' save_pretrained writes them. cache: where what is pretrained and pilots on their
    way are kept.
    """

    pilots: tuple[str, ...]
    steps: PositiveInt = 60
    seeds: PositiveInt = 3
    batch: PositiveInt = 4
    rate: PositiveFloat = 1e-3
    rank: PositiveInt = 4
    margin: PositiveFloat = 0.01
    pretraining: NonNegativeInt = 300
    minilm: str = ""
    smollm2: str = ""
    cache: str = Field(default="results/pilots", min_length=1)

    @field_validator("pilots")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            read(divide(name)[0])
        return names


def divide(pilot: str) -> tuple[str, dict[str, int]]:
    """(name, sizes of its own) of a pilot as the config has it. Raises ValueError for others."""
    name, *parts = (part.strip() for part in pilot.split(";"))
    sizes = {}
    for part in parts:
        size, number = (*part.split(maxsplit=1), "", "")[:2]
        if size not in SIZES or not number.isdecimal() or not int(number):
            expected = f"one of {list(SIZES)} and a number above 0 after each semicolon"
            raise ValueError(f"pilot: got {part!r} in {pilot!r}, expected {expected}")
        sizes[size] = int(number)
    return name, sizes


def read(name: str) -> tuple[str, int, str | None]:
    """(model, length, method or None) of a pilot's name. Raises ValueError for others."""
    model, length, method = (*name.split(maxsplit=2), "", "")[:3]
    most = pilots.POSITIONS.get(model, 0)
    if not length.isdecimal() or not 16 <= int(length) <= most:
        expected = f"one of {list(pilots.POSITIONS)} and 16 tokens to as many as it takes"
        raise ValueError(f"pilot: got {name!r}, expected {expected}")
    if method == "chosen":
        return model, int(length), None
    read_method(method, int(length), causal=model != "minilm")
    return model, int(length), method


def points(config: Config) -> list[dict[str, Any]]:
    """A point for each pilot, with the sizes that pilots of one figure may differ in."""
    sizes = {name: getattr(config, name) for name in POINTS if name != "pilots"}
    return [{"pilot": name, **sizes, **own} for name, own in map(divide, config.pilots)]


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the texts."""
    return {"text": text.fingerprint()}


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """The choice of methods, times, runs and the outcome, as the pilot's own file has them.

    A pilot that is killed goes on from its last evaluation.
    """
    name, length, method = read(point["pilot"])
    folder = Path({"minilm": config.minilm, "smollm2": config.smollm2}.get(name, ""))
    task = pilots.task(name, length, folder)
    sizes = {size: point[size] for size in ("steps", "seeds", "batch", "rate")}
    settings = Settings(length, rank=config.rank, margin=config.margin, method=method, **sizes)
    cache = Path(config.cache)
    classes = None if task.classes is None else len(task.classes)
    load = pilots.loader(name, folder, settings.lora, classes, cache, config.pretraining)
    # Named as the row will be, so that no other pilot goes on from it.
    fields = config.model_dump(mode="json", exclude={*POINTS, *PLACES}) | inputs(config)
    out = cache / store.key("pilot", VERSION, fields, point)
    asked = {"model": name, "text": text.fingerprint(), **vars(settings)}
    state = Pilot(load, task, settings, asked, out, lambda *_: None).run()
    return {part: state[part] for part in KEPT if part in state}
