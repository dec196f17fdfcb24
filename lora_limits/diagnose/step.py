"""What attention costs in a step of LoRA training, and so the most that any method can save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lora_limits.diagnose.layers import Place
from lora_limits.diagnose.losses import Inputs
from lora_limits.diagnose.recording import Recorder, forward_and_back

ROUNDS, MOST_SECONDS = 5, 20.0


def time_step(model: Any, places: Sequence[Place], inputs: Inputs) -> dict[str, float]:
    """Seconds of a forward and backward pass of one window: whole, and with attention left out.

    Left out, each head's output is its own value. By turns, a median of as many rounds as fit in
    MOST_SECONDS, ROUNDS at most. Blocks are computed again in the backward pass, as in training
    that saves memory; torch's own attention, on the device that the model lies on.
    """
    seconds: dict[str, list[float]] = {"whole": [], "without": []}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for name, held in seconds.items():
            recorder = Recorder(places, skip=name == "without")
            start = time.perf_counter()
            forward_and_back(model, inputs, recorder)
            held.append(time.perf_counter() - start)
        if time.perf_counter() - began > MOST_SECONDS:
            break
    whole, without = (statistics.median(held) for held in seconds.values())
    return {"whole": whole, "without": min(without, whole)}


def payoff(
    step: Mapping[str, float], rows: Sequence[Mapping[str, Any]], tokens: int
) -> dict[str, float]:
    """Amdahl's law at this length: tokens a second as it is, with what pays now, and at the most.

    rows: the heads that were looked at, which stand for all. A head whose method pays now takes its
    share of the exact time; the others, refused ones too, stay exact.
    """
    attention = step["whole"] - step["without"]
    saved = [
        1 - row["seconds"]["method"] / row["seconds"]["exact"]
        for row in rows
        if row.get("verdict") == "now"
    ]
    share = sum(saved) / max(len(rows), 1)
    return {
        "share": attention / step["whole"],
        "most": step["whole"] / step["without"],
        "exact": tokens / step["whole"],
        "approximate": tokens / (step["whole"] - share * attention),
        "limit": tokens / step["without"],
    }
