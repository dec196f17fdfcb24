"""What a practitioner can turn, and to what: the norm bound, the LoRA rank, the mini-batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def head_dials(row: Row, tolerance: float) -> dict[str, Any]:
    """The three dials of one head.

    gamma_needed          the centred Gamma at which the head's affordable method is within the
                          tolerance (the present one where it is already); None below a sixteenth
    rank_allowed          r ((gamma_needed - frozen) / u)^2, the rank at which the adapter's update
                          u, growing as sqrt(rank), would fill what the frozen weights leave of that
                          bound; 0 where they leave no room for rank 1, None where nothing limits it
                          or projections differ in rank
    batch_at_tolerance    (noise / tolerance)^2, the largest mini-batch, in windows, whose gradient
                          noise is above the tolerance
    batch_at_error        above the method's error
    """
    # A rank acts through Gamma alone: what the adapter adds to the frozen queries and keys.
    frozen = row["norms"]["frozen"]["gamma_centred"]
    scale = row["dial"]["scale"]
    rank = row["rank_of_adapter"]
    needed = None if scale is None else scale * row["norms"]["adapted"]["gamma_centred"]
    update = max((row["update"].get(name, 0.0) for name in ("query", "key")), default=0.0)
    if scale == 1.0 or rank is None:
        allowed = None
    elif needed is None or needed <= frozen:
        allowed = 0
    else:
        allowed = None if update == 0 else math.floor(rank * ((needed - frozen) / update) ** 2)
    # What is hidden by the noise of a mini-batch costs a run nothing.
    noise = row["noise"]
    return {
        "gamma_needed": needed,
        "rank_allowed": allowed,
        "batch_at_tolerance": _batch_hiding(tolerance, noise),
        "batch_at_error": _batch_hiding(max(row["error"], 1e-9), noise),
    }


def _batch_hiding(error: float, noise: float | None) -> int | None:
    """The largest mini-batch whose noise, that of one window over sqrt(size), is above an error."""
    return None if noise is None else math.floor((noise / error) ** 2)


def _beyond(row: Row, needed: float | None) -> bool:
    """Whether the frozen weights alone exceed the bound, of a head that is not within it."""
    outside = row["dial"]["scale"] != 1.0
    return outside and (needed is None or needed <= row["norms"]["frozen"]["gamma_centred"])


def _median(values: Sequence[float | None]) -> float | None:
    held = [v for v in values if v is not None]
    return statistics.median(held) if held else None


def dials(rows: Sequence[Row], *, tolerance: float, length: int) -> dict[str, dict[str, Any]]:
    """Each dial over the analysed heads, at least one: what it is, what it needs, a paragraph."""
    return {
        "norm": _norm(rows, tolerance, length),
        "rank": _rank(rows),
        "batch": _batch(rows, tolerance, length),
    }


def _norm(rows: Sequence[Row], tolerance: float, length: int) -> dict[str, Any]:
    """Medians of the centred Gamma: as it is, and as the affordable method needs it.

    None: below a sixteenth of what it is.
    """
    dials_of = [row["dial"] for row in rows]
    methods = sorted({dial["method"] for dial in dials_of})
    method = methods[0] if len(methods) == 1 else f"{methods[0]} to {methods[-1]}"
    longest = max(dial["pays_from"] for dial in dials_of)
    pays = f"pays at {length} tokens" if longest <= length else f"would pay from {longest:,} tokens"
    there = sum(dial["scale"] == 1.0 for dial in dials_of)
    lost = sum(dial["scale"] is None for dial in dials_of)
    gamma = _median([row["norms"]["adapted"]["gamma_centred"] for row in rows])
    # Heads below a sixteenth count as 0, so that they pull the median down.
    needed = _median([row["dials"]["gamma_needed"] or 0.0 for row in rows]) or None
    bound = "less than a sixteenth of that" if needed is None else f"{needed:.2g}"
    text = (
        f"{method} {pays}. The queries and keys of the median head, centred, reach Gamma = "
        f"{gamma:.2g}; for {tolerance:.0%} error with that method it would have to be {bound}. "
        f"{there} of {len(rows)} heads are there."
    )
    text += f" {lost} would not be at a sixteenth of their norms." if lost else ""
    return {
        "is": gamma,
        "needs": needed,
        "method": method,
        "pays": pays,
        "there": there,
        "text": text,
    }


def _rank(rows: Sequence[Row]) -> dict[str, Any]:
    """The adapter's rank; how many heads no rank helps; the rank with room elsewhere (median)."""
    ranks = {row["rank_of_adapter"] for row in rows}
    rank = ranks.pop() if len(ranks) == 1 else None
    frozen = _median([row["norms"]["frozen"]["gamma_centred"] for row in rows])
    adapted = _median([row["norms"]["adapted"]["gamma_centred"] for row in rows])
    full = sum(_beyond(row, row["dials"]["gamma_needed"]) for row in rows)
    room = _median([row["dials"]["rank_allowed"] or None for row in rows])
    told = "mixed ranks" if rank is None else f"rank {rank}"
    text = f"The adapter ({told}) moves the median head's Gamma from "
    text += f"{frozen:.3g} (frozen weights) to {adapted:.3g}. "
    if full:
        text += f"In {full} of {len(rows)} heads the frozen weights alone exceed the bound: "
        text += "no rank brings them below. "
    if room is not None:
        text += f"Elsewhere the bound leaves room for rank {room:.0f} (median). "
    text += "The rank itself costs next to nothing: it acts through the norms."
    return {"is": rank, "needs": room, "full": full, "text": text}


def _batch(rows: Sequence[Row], tolerance: float, length: int) -> dict[str, Any]:
    """The noise of one window (median), and the mini-batch whose noise hides the tolerance."""
    noise = _median([row["noise"] for row in rows])
    if noise is None:
        return {
            "is": None,
            "needs": None,
            "text": "Gradient noise takes two windows: a longer text, or --batch.",
        }
    most = _median([row["dials"]["batch_at_tolerance"] for row in rows]) or 0
    within = sum((row["dials"]["batch_at_error"] or 0) >= 1 for row in rows)
    text = (
        f"The gradient of one window of {length} tokens has {noise:.0%} noise in the median head. "
    )
    if most >= 1:
        text += (
            f"An error of {tolerance:.0%} is below the noise of every mini-batch up to "
            f"{most:.0f} windows, where it costs nothing; larger batches need a smaller error. "
        )
    else:
        text += f"That is below {tolerance:.0%}: an error of this size is felt at any mini-batch. "
    text += f"{within} of {len(rows)} heads have an error below the noise of a single window."
    return {"is": noise, "needs": most, "text": text}
