"""From a peft model and windows of tokens to a diagnosis: every head, three dials, the notes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np

from lora_limits.diagnose import dials, heads, loading, measure, times
from lora_limits.diagnose.activations import NAMES, Layer, record
from lora_limits.diagnose.adapters import Projection, projection

VERSIONED = ("lora_limits", "jax", "torch", "transformers", "peft")
# What a reader has to know of a diagnosis, the last three where they apply.
TARGET = (
    "No task is given, so the gradients are those of a stand-in: the target is the frozen "
    "head's output plus a tenth of Gaussian noise. Errors and noise are relative to its "
    "gradient."
)
WINDOWS = (
    "Each window is a data point of its own, as in the model; only a method that pays from "
    "longer texts is tried again on the windows laid end to end, where the model itself does "
    "not go."
)
LONGER = (
    "Lengths from which a method pays assume that the rank that is enough there stays enough up"
    " to that length; times beyond {} tokens are carried on as L and L squared."
)
BEYOND = (
    "The model takes at most {} tokens: longer lengths are of its attention, were its positions"
    " extended."
)
PREDICTED = (
    "Predicted: the speed-up by the operations that `choose` counts, those of the certificate "
    "included, which the timed gradient goes without."
)
CAUSAL = (
    "The model's attention is causal; the gradient analysed is of the paper's attention, "
    "without a mask, on the same queries, keys and values."
)
ROTATED = (
    "Positions or a normalisation stand between projections and scores (rotary): norms are of "
    "the rotated queries and keys, gradients of the value adapter only; query and key adapters "
    "are refused."
)


def diagnose(
    adapted: Any,
    ids: np.ndarray,
    *,
    tolerance: float,
    model: str = "model",
    adapter: str = "adapter",
    keep: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The diagnosis of a peft model on windows of token ids (windows, L), as JSON holds it.

    model, adapter: their names; keep: called with what there is after each layer. Holds the
    activations of all windows at once: O(windows layers L d_model) memory.
    Raises ValueError where the model cannot be run on the windows.
    """
    # Every window twice, without the adapter too: its norms are those that no rank changes.
    base = adapted.get_base_model()
    with loading.one_line(type(base).__name__):
        with adapted.disable_adapter():
            frozen = [record(base, row) for row in ids]
        recorded = [record(base, row) for row in ids]
    diagnosis: dict[str, Any] = {
        "model": model,
        "adapter": adapter,
        "tolerance": tolerance,
        "length": int(ids.shape[1]),
        "windows": len(ids),
        "longest": loading.longest_window(base),
        "versions": {name: metadata.version(name) for name in VERSIONED},
        "cpus": os.cpu_count(),
        "heads": [],
        "dials": {},
        "notes": [],
    }
    clock = times.Clock()
    # A layer of which nothing was recorded has one row.
    rows_of = [1 if layer.query is None else len(layer.query) for layer in recorded[0]]
    with _progress(sum(rows_of)) as tick:
        for number in range(len(rows_of)):
            without, with_ = ([window[number] for window in kind] for kind in (frozen, recorded))
            for row in _layer(base, number, without, with_, clock=clock, tolerance=tolerance):
                diagnosis["heads"].append(row)
                tick(f"layer {number}")
            # After each layer, so that what is kept is a diagnosis of the layers so far.
            _conclude(diagnosis)
            if keep is not None:
                keep(diagnosis)
    return diagnosis


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal's stderr; what it yields moves it on by one, with a word on where."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("heads", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def _layer(
    base: Any,
    number: int,
    frozen: Sequence[Layer],
    recorded: Sequence[Layer],
    *,
    clock: times.Clock,
    tolerance: float,
) -> Iterator[dict[str, Any]]:
    """The rows of a layer's heads; one row, refused, for a layer of which nothing was recorded."""
    whole = {name: projection(base, recorded[0], name) for name in NAMES}
    bare = {name: dataclasses.replace(p, a=None, b=None) for name, p in whole.items()}
    # A refused head is a row like the others; the reason stands where its verdict would.
    start = {"layer": number, "module": recorded[0].path, "refused": None}
    try:
        count = heads.counts(recorded[0])[0]
    except heads.Refused as error:
        yield start | {"head": 0, "refused": str(error)}
        return
    for head in range(count):
        try:
            row = _head((frozen, bare), (recorded, whole), head, clock=clock, tolerance=tolerance)
        except heads.Refused as error:
            row = {"refused": str(error)}
        yield start | {"head": head} | row


Windows = tuple[Sequence[Layer], dict[str, Projection]]


def _head(
    frozen: Windows, adapted: Windows, head: int, *, clock: times.Clock, tolerance: float
) -> dict[str, Any]:
    """One row, without its place. Raises heads.Refused."""
    without = [heads.make_head(layer, frozen[1], head, seed=n) for n, layer in enumerate(frozen[0])]
    found = [heads.make_head(layer, adapted[1], head, seed=n) for n, layer in enumerate(adapted[0])]
    row: dict[str, Any] = {
        "form": found[0].form,
        "causal": found[0].causal,
        "adapters": list(found[0].adapted),
        "without_gradient": found[0].without,
        "rank_of_adapter": _rank(adapted[1]),
        "update": {n: max(h.update[n] for h in found) for n in found[0].update},
        "norms": {"frozen": measure.norms(without), "adapted": measure.norms(found)},
    }
    if not found[0].adapted:
        reason = "; ".join(f"{n}: {why}" for n, why in found[0].without.items())
        return row | {"refused": f"no adapter with a gradient ({reason or 'none on this layer'})"}
    row |= measure.measure_head(found, clock, tolerance)
    return row | {"dials": dials.head_dials(row, tolerance)}


def _rank(projections: dict[str, Projection]) -> int | None:
    """The rank of the adapters on query and key, else of the value's; None where they differ."""
    ranks = {n: p.a.shape[0] for n, p in projections.items() if p.a is not None}
    scored = {r for n, r in ranks.items() if n != "value"} or set(ranks.values())
    return scored.pop() if len(scored) == 1 else None


def _conclude(diagnosis: dict[str, Any]) -> None:
    """The dials and notes of the heads so far."""
    rows = diagnosis["heads"]
    analysed = [row for row in rows if not row["refused"]]
    if analysed:
        diagnosis["dials"] = dials.dials(
            analysed, tolerance=diagnosis["tolerance"], length=diagnosis["length"]
        )
    notes = [TARGET, WINDOWS, LONGER.format(times.LONGEST), PREDICTED]
    longest = diagnosis["longest"]
    beyond = any((row.get("pays_from") or 0) > longest for row in rows)
    notes += [BEYOND.format(longest)] * beyond
    notes += [CAUSAL] * any(row.get("causal") for row in rows)
    notes += [ROTATED] * any(row.get("form") == "rotated" for row in rows)
    diagnosis["notes"] = notes
