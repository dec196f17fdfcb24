"""From a peft model and windows of tokens to a diagnosis: every head, three dials, the notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lora_limits.diagnose import (
    dials,
    heads,
    longer,
    measure,
    methods,
    selection,
    step,
    texts,
    times,
)
from lora_limits.diagnose.layers import Layer, find_places
from lora_limits.diagnose.loading import one_line
from lora_limits.diagnose.projections import Projection, read_projections
from lora_limits.diagnose.recordings import Recordings
from lora_limits.diagnose.store import Store
from lora_limits.diagnose.task import Task
from lora_limits.instruments import cores
from lora_limits.instruments.progress import Progress
from lora_limits.problem_checks import structure_of

VERSIONED = ("lora_limits", "jax", "torch", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a diagnosis, beside the model, its windows and its task."""

    tolerance: float
    model: str = "model"  # names
    adapter: str = "adapter"
    layers: str | None = None
    heads: str | None = None
    notes: tuple[str, ...] = ()
    folder: Path | None = None  # where recordings lie while they are needed
    at: longer.AtLength | None = None  # for lengths beyond the windows'
    keep: Callable[[dict[str, Any]], Any] | None = None  # called with what there is, layer by layer


def diagnose(
    adapted: Any,
    windows: texts.Windows,
    task: Task,
    request: Request,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The diagnosis of a peft model on windows of tokens, as JSON holds it.

    Recordings lie on disk and are read layer by layer: O(windows L d_model) memory beside one pass
    of the model.
    Raises ValueError where the model cannot be run on the windows, and for a selection that names no
    head.
    """
    base = adapted.get_base_model()
    progress = progress or Progress(quiet=True)
    with Store(request.folder) as store:
        recordings = Recordings(base, find_places(base), windows, task, store)
        with one_line(type(base).__name__):
            progress.stage("looking at the model")
            recordings.look()
        chosen = selection.select(recordings.counts, request.layers, request.heads)
        diagnosis = _beginning(base, windows, task, request, recordings.counts)
        with one_line(type(base).__name__):
            recordings.record(chosen, progress)
            if recordings.usable:
                progress.stage("timing a training step")
                diagnosis["step"] = step.time_step(base, recordings.places, task.inputs(0))
        clock = times.Clock()
        _measure(diagnosis, recordings, chosen, clock, request, progress)
    if request.at is not None:
        longer.confirm(recordings, diagnosis, request.at, clock, request.folder, progress)
        _conclude(diagnosis)
    return diagnosis


def _measure(
    diagnosis: dict[str, Any],
    recordings: Recordings,
    chosen: Mapping[int, Sequence[int]],
    clock: times.Clock,
    request: Request,
    progress: Progress,
) -> None:
    """Measures every chosen head into the diagnosis."""
    progress.stage("measuring heads", sum(map(len, chosen.values())))
    for number, wanted in chosen.items():
        for row in _layer(recordings.base, number, wanted, recordings, clock, request.tolerance):
            diagnosis["heads"].append(row)
            progress.step()
        # After each layer, so that what is kept is a diagnosis of the layers so far.
        _conclude(diagnosis)
        if request.keep is not None:
            request.keep(diagnosis)


def _beginning(
    base: Any, windows: texts.Windows, task: Task, request: Request, counts: dict[int, int]
) -> dict[str, Any]:
    return {
        "model": request.model,
        "adapter": request.adapter,
        "task": task.name,
        "no_task": task.why,
        "tolerance": request.tolerance,
        "length": int(windows.ids.shape[1]),
        "windows": len(windows.ids),
        "longest": texts.longest_window(base),
        "of_heads": sum(counts.values()),
        "versions": {name: metadata.version(name) for name in VERSIONED},
        "cpus": cores.usable(),
        "device": jax.devices()[0].device_kind,
        "model_device": str(base.device),
        "heads": [],
        "dials": {},
        "notes": list(request.notes),
    }


def _layer(
    base: Any,
    number: int,
    chosen: Sequence[int],
    recordings: Recordings,
    clock: times.Clock,
    tolerance: float,
) -> Iterator[dict[str, Any]]:
    """The rows of a layer's heads; a refused one is a row like the others, with the reason."""
    place = recordings.place(number)
    layers = recordings.layers(number)
    whole = read_projections(base, place, layers[0]) if layers else {}
    inputs = [heads.Inputs() for _ in layers]
    for head in chosen:
        row: dict[str, Any] = {"layer": number, "module": place.path, "head": head}
        why = recordings.refused.get((number, head))
        if why is None:
            response = recordings.responses.get((number, head))
            try:
                recordings.check_reached(layers, head)
                found = list(_heads(layers, whole, head, inputs, response))
                row |= {"response": response} | _row(found, whole, clock, tolerance)
            except heads.Refused as error:
                why = str(error)
        yield {"refused": why} | row


def _heads(
    layers: Sequence[Layer],
    whole: dict[str, Projection],
    head: int,
    inputs: Sequence[heads.Inputs],
    response: float | None,
) -> Iterator[heads.Head]:
    """The head in each window, under one strength of the residual. Raises heads.Refused."""
    strength = None
    for window, layer in enumerate(layers):
        found = heads.make_head(
            layer,
            whole,
            head,
            inputs=inputs[window],
            response=response or 1.0,
            strength=strength,
            seed=window,
        )
        strength = found.strength
        yield found


def _row(
    found: Sequence[heads.Head],
    whole: dict[str, Projection],
    clock: times.Clock,
    tolerance: float,
) -> dict[str, Any]:
    """One row, without its place."""
    problem = found[0].problem
    row: dict[str, Any] = {
        "form": found[0].form,
        "causal": problem.causal,
        "window": problem.window,
        "adapters": list(found[0].adapted),
        "without_gradient": found[0].without,
        "rank_of_adapter": _rank(whole),
        "update": {n: max(h.update[n] for h in found) for n in found[0].update},
        "norms": {
            "frozen": measure.norms([h.frozen for h in found]),
            "adapted": measure.norms([h.scores for h in found]),
        },
    }
    if not found[0].adapted:
        reason = "; ".join(f"{n}: {why}" for n, why in found[0].without.items())
        return row | {"refused": f"no adapter with a gradient ({reason or 'none on this layer'})"}
    if not methods.ladder(problem, problem.x_query.shape[0]):
        has = ", ".join(structure_of(problem))
        tokens = problem.x_query.shape[0]
        return row | {
            "refused": f"no approximate method at {tokens} tokens for what it has ({has})"
        }
    row |= measure.measure_head(found, clock, tolerance)
    return row | {"dials": dials.head_dials(row, tolerance)}


def _rank(projections: dict[str, Projection]) -> int | None:
    """The rank of the adapters on query and key, else of the value's; None where they differ."""
    ranks = {n: p.a.shape[0] for n, p in projections.items() if p.a is not None}
    scored = {r for n, r in ranks.items() if n != "value"} or set(ranks.values())
    return scored.pop() if len(scored) == 1 else None


def _conclude(diagnosis: dict[str, Any]) -> None:
    """The dials and the payoff of the heads so far."""
    rows = diagnosis["heads"]
    analysed = [row for row in rows if not row["refused"]]
    if not analysed:
        return
    tolerance, length = diagnosis["tolerance"], diagnosis["length"]
    diagnosis["dials"] = dials.dials(analysed, tolerance=tolerance, length=length)
    if "step" in diagnosis:
        diagnosis["payoff"] = step.payoff(diagnosis["step"], rows, length)
