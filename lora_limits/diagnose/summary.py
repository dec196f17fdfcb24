"""A diagnosis in ten lines of 80 columns, and its notes."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from typing import Any

from lora_limits.diagnose.advice import advise, basis, commonest
from lora_limits.diagnose.times import LONGEST

WIDTH = 80
BASES = {"measured": "measured", "end to end": "windows end to end", "extrapolated": "extrapolated"}


def headline(diagnosis: dict[str, Any]) -> str:
    """What to do, in one line."""
    advice = advise(diagnosis)
    length = f"{diagnosis['length']:,}"
    said = {
        "go": f"go, at {length} tokens",
        "change": f"change the norms first, then go from {advice.tokens or 0:,} tokens",
        "no": f"no, at {length} tokens",
    }.get(advice.verdict, "")
    known = f"{advice.tokens or 0:,} tokens ({BASES[advice.basis or 'measured']})"
    if advice.verdict == "later":
        said = f"go from {known}"
    elif advice.verdict == "no" and advice.tokens:
        said = f"no, it would pay from {known}"
    name = textwrap.shorten(diagnosis["model"], 24, placeholder="...")
    stand_in = "" if diagnosis.get("task") else ", by a stand-in"
    return f"{name}: {said}{stand_in}"


def summary(diagnosis: dict[str, Any]) -> list[str]:
    """Nine lines: what to do, why, the three dials, what it would save, what it rests on."""
    rows = diagnosis["heads"]
    analysed = [row for row in rows if not row["refused"]]
    lines = [
        ("Heads", heads(diagnosis)),
        ("Method", _method(diagnosis, analysed)),
        ("Norms", _norms(diagnosis)),
        ("Rank", _rank(diagnosis, len(analysed))),
        ("Batch", _batch(diagnosis)),
        ("Payoff", _payoff(diagnosis)),
        ("Task", _task(diagnosis)),
        ("Lengths", _lengths(diagnosis)),
    ]
    whole = [headline(diagnosis), *(f"{label:<9}{text}" for label, text in lines)]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in whole]


def heads(diagnosis: dict[str, Any]) -> str:
    """How many heads there are of each kind."""
    rows = diagnosis["heads"]
    verdicts = Counter(row.get("verdict") for row in rows if not row["refused"])
    refused = sum(bool(row["refused"]) for row in rows)
    of = diagnosis.get("of_heads", len(rows))
    looked = f"{len(rows)}" if of == len(rows) else f"{len(rows)} of {of}"
    return (
        f"{looked}: {verdicts['now']} pay now, {verdicts['later']} on longer texts, "
        f"{verdicts['never']} never, {refused} refused"
    )


def _method(diagnosis: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    paying = [row for row in rows if row.get("pays_from")]
    allowed = f"{diagnosis['tolerance']:.0%} is allowed"
    if paying:
        error = statistics.median(row["error"] for row in paying)
        return f"{commonest(paying)} most often, median error {error:.1%}; {allowed}"
    if not rows:
        return "none: no head could be analysed"
    # Of the longest window that it was tried in: errors grow with the length.
    tried = [row.get("longer", row) for row in rows]
    errors = [math.inf if of["error"] is None else of["error"] for of in tried]
    least = statistics.median(errors)
    longest = max(of.get("length", diagnosis["length"]) for of in tried)
    beyond = f" at {longest:,} tokens" if longest > diagnosis["length"] else ""
    said = f"{least:.0%}" if least < 10 else "over 1000%"
    return f"none: at best {said}{beyond} in the median head; {allowed}"


def _norms(diagnosis: dict[str, Any]) -> str:
    norm = diagnosis["dials"].get("norm")
    if not norm:
        return "unknown"
    needs = "less than a sixteenth" if norm["needs"] is None else f"{norm['needs']:.2g}"
    return f"Gamma is {norm['is']:.2g} in the median head, {norm['method']} needs {needs}"


def _rank(diagnosis: dict[str, Any], count: int) -> str:
    rank = diagnosis["dials"].get("rank")
    if not rank:
        return "unknown"
    if rank["full"]:
        return f"no rank helps {rank['full']} of {count} heads: frozen norms are too large"
    if rank["needs"] is None:
        return "no rank changes this: the adapter is not what makes norms large"
    return f"room for rank {rank['needs']:.0f}: the adapter is not what makes norms large"


def _batch(diagnosis: dict[str, Any]) -> str:
    batch = diagnosis["dials"].get("batch")
    if not batch or batch["is"] is None:
        return "unknown: gradient noise takes two windows (a longer text, or --batch)"
    tolerance = f"{diagnosis['tolerance']:.0%}"
    if (batch["needs"] or 0) < 1:
        return f"noise of {batch['is']:.0%} a window: an error of {tolerance} shows at any batch"
    hidden = f"hides an error of {tolerance} in batches up to {batch['needs']:.0f}"
    return f"noise of {batch['is']:.0%} a window {hidden}"


def _payoff(diagnosis: dict[str, Any]) -> str:
    pay = diagnosis.get("payoff")
    if not pay:
        return "not timed"
    speeds = f"{pay['exact']:,.0f} tokens/s, {pay['approximate']:,.0f} by what pays now"
    return f"attention takes {pay['share']:.0%}: {speeds}, {pay['limit']:,.0f} at most"


def _task(diagnosis: dict[str, Any]) -> str:
    task = diagnosis.get("task")
    told = task or f"a stand-in: {diagnosis.get('no_task') or 'no loss'}"
    windows = f"{diagnosis['windows']} x {diagnosis['length']:,} tokens"
    return f"{windows}, adapter {diagnosis['adapter']}, {told}"


def _lengths(diagnosis: dict[str, Any]) -> str:
    found = Counter(basis(row) for row in diagnosis["heads"] if basis(row))
    if not found:
        return f"measured at {diagnosis['length']:,} tokens on {_device(diagnosis)}"
    said = ", ".join(f"{count} {BASES[name or 'measured']}" for name, count in found.items())
    longest = diagnosis["longest"]
    if found["extrapolated"] and longest > diagnosis["length"]:
        return f"{said}; --length {longest} measures further ({_device(diagnosis)})"
    return f"{said}, on {_device(diagnosis)}"


def _device(diagnosis: dict[str, Any]) -> str:
    cpus = diagnosis["cpus"]
    cores = "1 core" if cpus == 1 else f"{cpus} cores"
    device = diagnosis.get("device", "cpu")
    return cores if device == "cpu" else device


def notes(diagnosis: dict[str, Any]) -> list[str]:
    """What a reader has to know of a diagnosis, those that apply."""
    rows = diagnosis["heads"]
    found = list(diagnosis.get("notes", []))
    if diagnosis.get("task"):
        found.append(
            f"The gradient is that of the model's own loss ({diagnosis['task']}): each head's target "
            "is its output less dl/dO, scaled so that an error of the output changes it as much as "
            "it does in the model. Errors and noise are relative to that gradient."
        )
    else:
        found.append(
            "No task is given, so the gradients are those of a stand-in: the target is the frozen "
            "head's output plus a tenth of Gaussian noise. Errors and noise are relative to its "
            "gradient."
        )
    found.append(
        "Each window is a data point of its own, as in the model. A method that pays from longer "
        "texts is tried again in a longer window, where the model and the text reach it, and on the "
        "windows laid end to end where tokens have no order."
    )
    if any(basis(row) == "extrapolated" for row in rows):
        found.append(
            "Extrapolated lengths assume that the rank that is enough at the longest measured one "
            f"stays enough; times beyond {LONGEST:,} tokens are carried on as L and L squared."
        )
    if any(basis(row) == "end to end" for row in rows):
        found.append(
            f"The model takes at most {diagnosis['longest']:,} tokens; longer lengths are of its "
            "attention on windows laid end to end, where the model itself does not go."
        )
    if any(row.get("form") in ("recorded", "rotated") for row in rows):
        found.append(
            "Where a normalisation stands between projections and scores the gradient is of the "
            "value adapter alone."
        )
    return found
