"""Lengths from which heads would pay, measured in the model where its positions reach them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_limits.diagnose import heads, texts
from lora_limits.diagnose.dials import head_dials
from lora_limits.diagnose.errors import arrays, error, exact_arrays
from lora_limits.diagnose.methods import label, ladder, scale_needed
from lora_limits.diagnose.projections import read_projections
from lora_limits.diagnose.recordings import Recordings
from lora_limits.diagnose.store import Store
from lora_limits.diagnose.task import Task
from lora_limits.diagnose.times import Clock
from lora_limits.instruments.progress import Progress

MOST = 8192  # tokens of a window that is recorded for this alone
# One window of so many tokens, and its task; None where the text is shorter.
AtLength = Callable[[int], tuple[texts.Windows, Task] | None]


def lengths(rows: list[dict[str, Any]], longest: int) -> dict[int, list[dict[str, Any]]]:
    """The heads whose length is extrapolated though the model reaches it, by the window that does.

    Windows are of powers of two, or of the most that the model takes: heads share them.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["refused"] or row.get("basis") != "extrapolated":
            continue
        if row["pays_from"] <= min(longest, MOST):
            length = min(2 ** math.ceil(math.log2(row["pays_from"])), longest, MOST)
            found.setdefault(length, []).append(row)
    return found


def confirm(
    recordings: Recordings,
    diagnosis: dict[str, Any],
    at: AtLength,
    clock: Clock,
    folder: Path | None,
    progress: Progress,
) -> None:
    """Measures heads once more, in one longer window of the model that reaches their length.

    Where the method is still within the tolerance the basis is "measured"; where it is not the head
    never pays, with what was tried, and its dials are those of that window. row["longer"]:
    {"length", "error"}, and seconds there. folder: where recordings lie meanwhile.
    """
    for length, rows in sorted(lengths(diagnosis["heads"], diagnosis["longest"]).items()):
        given = at(length)
        if given is None:
            continue
        chosen: dict[int, list[int]] = {}
        for row in rows:
            chosen.setdefault(row["layer"], []).append(row["head"])
        with Store(folder) as held:
            there = Recordings(recordings.base, recordings.places, *given, held)
            there.look()
            there.record(chosen, progress)
            progress.stage(f"measuring at {length:,} tokens", len(rows))
            for number in chosen:
                here = [row for row in rows if row["layer"] == number]
                _layer(there, number, here, clock, diagnosis["tolerance"])
                for _ in here:
                    progress.step()


def _layer(
    there: Recordings, number: int, rows: list[dict[str, Any]], clock: Clock, tolerance: float
) -> None:
    layers = there.layers(number)
    if not layers:
        return
    whole = read_projections(there.base, there.place(number), layers[0])
    inputs = heads.Inputs()
    for row in rows:
        response = there.responses.get((number, row["head"]), 1.0)
        try:
            there.check_reached(layers, row["head"])
            found = heads.make_head(layers[0], whole, row["head"], inputs=inputs, response=response)
        except heads.Refused:
            continue
        _measure(row, found.problem, clock, tolerance)


def _measure(row: dict[str, Any], problem: Any, clock: Clock, tolerance: float) -> None:
    tokens = problem.x_query.shape[0]
    known = [method for family in ladder(problem, tokens).values() for method in family]
    method = next((m for m in known if label(m) == row["method"]), None)
    if method is None:
        return
    wrong = error(arrays(problem, method)[0], exact_arrays(problem))
    row["longer"] = {"length": tokens, "error": wrong}
    if wrong > tolerance:
        # What it would need is what it would need here, where it was to pay.
        scale = scale_needed(problem, method, tolerance)
        row["dial"] = {"method": row["method"], "pays_from": row["pays_from"], "scale": scale}
        row["dials"] = head_dials(row, tolerance)
        row |= {"verdict": "never", "pays_from": None, "basis": None}
        return
    mine, exact = clock.pair(problem, method)
    row["longer"] |= {"method": mine, "exact": exact}
    if mine < exact:
        row["basis"] = "measured"
