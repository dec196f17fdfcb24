"""All windows of a diagnosis recorded: which heads can be analysed, their layers, their responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_limits.diagnose.heads import Refused, check_rebuilt
from lora_limits.diagnose.layers import Layer, Place
from lora_limits.diagnose.recording import Recorder, forward, forward_and_back, survey
from lora_limits.diagnose.store import Store
from lora_limits.diagnose.task import Task
from lora_limits.diagnose.texts import Windows
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.instruments.progress import Progress

CHECKED = 512  # tokens on which attention is rebuilt and held against the model's own
SHARE = 0.01  # of its root mean square: the error put on every output, to see what residuals do


class Recordings:
    """What a model does on its windows, as far as heads can be analysed.

    After `look`: places, the attention modules that run; counts, the heads of each; refused, why a
    (layer, head) cannot be analysed. After `record`: usable, the chosen heads that can; responses,
    how much a residual dl/dO changes where all outputs err, relative to their relative error.
    """

    def __init__(
        self, base: Any, places: Sequence[Place], windows: Windows, task: Task, store: Store
    ) -> None:
        self.base, self.places, self.windows = base, list(places), windows
        self.task, self.store = task, store
        self.counts: dict[int, int] = {}
        self.refused: dict[tuple[int, int], str] = {}
        self.usable: dict[int, tuple[int, ...]] = {}
        self.responses: dict[tuple[int, int], float] = {}
        base.config.use_cache = False

    def place(self, number: int) -> Place:
        """The attention module of a number."""
        return next(place for place in self.places if place.number == number)

    def look(self) -> None:
        """Runs the model on a short window: finds heads, holds each against the model's own."""
        short = self.task.tokens(0, CHECKED)
        looked, ran = survey(self.base, self.places, short)
        # What does not run has no gradient: the cross-attention of a decoder on its own.
        self.places = [place for place in self.places if ran[place.number]]
        for place in self.places:
            number = place.number
            layer = looked.get(number)
            # A layer of which nothing was recorded has one row.
            self.counts[number] = 1 if layer is None else layer.heads
            for head in range(self.counts[number]):
                why = self._why_not(place, layer, head, ran[number])
                if why is not None:
                    self.refused[number, head] = why

    def _why_not(self, place: Place, layer: Layer | None, head: int, times: int) -> str | None:
        if layer is None:
            kind = type(self.base.get_submodule(place.path)).__name__
            return f"{kind} does not go through transformers' attention interface"
        if times > 1:
            return f"its weights run {times} times in a pass: their gradient is of no one head"
        try:
            check_rebuilt(layer, head)
        except Refused as error:
            return str(error)
        return None

    def record(self, chosen: Mapping[int, Sequence[int]], progress: Progress) -> None:
        """Runs every window, and the first once more with errors in the attention."""
        for number, wanted in chosen.items():
            held = tuple(h for h in wanted if (number, h) not in self.refused)
            if held:
                self.usable[number] = held
        if not self.usable:
            return
        count = len(self.windows.ids)
        losses = self.task.name is not None
        length = self.windows.ids.shape[1]
        progress.stage(f"recording {count} x {length:,} tokens", count + losses)
        for window in range(count):
            self._record(window)
            progress.step()
        if losses:
            self._respond()
            progress.step()

    def _record(self, window: int) -> None:
        def taken(place: Place, layer: Layer) -> None:
            self.store.put(window, place.number, layer)

        def residual(place: Place, rows: dict[int, np.ndarray]) -> None:
            self.store.put_residual(window, place.number, rows)

        inputs = self.task.inputs(window)
        recorder = Recorder(self.places, taken, residual, chosen=self.usable)
        if self.task.name is None:
            forward(self.base, inputs, recorder)
        else:
            forward_and_back(self.base, inputs, recorder)

    def _respond(self) -> None:
        def residual(place: Place, rows: dict[int, np.ndarray]) -> None:
            own = self.store.layer(0, place.number).residual
            for head, moved in rows.items():
                self.responses[place.number, head] = frobenius_error(moved, own[head]) / SHARE

        recorder = Recorder(self.places, residual=residual, chosen=self.usable, noise=SHARE)
        forward_and_back(self.base, self.task.inputs(0), recorder)

    def layers(self, number: int) -> list[Layer]:
        """The layer in every window; none where none of its heads is usable."""
        if number not in self.usable:
            return []
        return [self.store.layer(window, number) for window in range(len(self.windows.ids))]

    def check_reached(self, layers: Sequence[Layer], head: int) -> None:
        """Raises Refused for a head that the loss of the task does not reach."""
        if self.task.name is not None and not all(head in layer.residual for layer in layers):
            raise Refused("the loss has no gradient for its output")
