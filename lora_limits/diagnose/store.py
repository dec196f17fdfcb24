"""Recordings on disk, a file for each window and layer: a model's activations do not fit in memory."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lora_limits.diagnose.layers import NAMES, Layer, Mask

HEADS = ("query", "key", "value", "residual")
PLAIN = ("heads", "groups", "scaling", "special")


class Store:
    """Layers of windows, written as they are recorded and read one at a time; gone at its close.

    Inputs that projections share are one array in a file, as they are in the model.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="recording-", dir=parent)
        self._facts: dict[tuple[int, int], dict[str, Any]] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    def _path(self, window: int, number: int, part: str) -> Path:
        return Path(self._folder.name) / f"{window}-{number}-{part}.npz"

    def put(self, window: int, number: int, layer: Layer) -> None:
        """Writes a layer without its residuals."""
        arrays: dict[str, np.ndarray] = {}
        owner: dict[int, str] = {}
        names = {}
        for name, rows in layer.x.items():
            names[name] = owner.setdefault(id(rows), f"x.{name}")
            arrays[names[name]] = rows
        for kind in ("query", "key", "value"):
            arrays |= {f"{kind}.{h}": rows for h, rows in getattr(layer, kind).items()}
        np.savez(self._path(window, number, "tokens"), **arrays)  # pyright: ignore
        facts = {name: getattr(layer, name) for name in PLAIN}
        mask = None if layer.mask is None else dataclasses.astuple(layer.mask)
        self._facts[window, number] = facts | {"x": names, "mask": mask}

    def put_residual(self, window: int, number: int, residual: dict[int, np.ndarray]) -> None:
        """Writes the residuals of a layer's heads."""
        arrays = {f"residual.{h}": rows for h, rows in residual.items()}
        np.savez(self._path(window, number, "residual"), **arrays)  # pyright: ignore

    def holds(self, window: int, number: int) -> bool:
        """Whether the layer was recorded in the window."""
        return (window, number) in self._facts

    def layer(self, window: int, number: int) -> Layer:
        """A layer as it was recorded."""
        facts = dict(self._facts[window, number])
        names, mask = facts.pop("x"), facts.pop("mask")
        arrays: dict[str, np.ndarray] = {}
        for part in ("tokens", "residual"):
            path = self._path(window, number, part)
            if path.exists():
                with np.load(path) as file:
                    arrays |= {name: file[name] for name in file.files}
        by_kind: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in HEADS}
        for name, rows in arrays.items():
            kind, _, head = name.partition(".")
            if kind in by_kind:
                by_kind[kind][int(head)] = rows
        x = {name: arrays[names[name]] for name in NAMES if name in names}
        return Layer(mask=None if mask is None else Mask(*mask), x=x, **by_kind, **facts)
