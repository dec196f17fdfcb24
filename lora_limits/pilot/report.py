"""A pilot in ten lines of 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_limits.pilot.choosing import SHARE
from lora_limits.pilot.outcome import LEVEL
from lora_limits.pilot.settings import Settings

SIDES = ("exact", "approximate")


def lines(state: Mapping[str, Any], settings: Settings) -> list[str]:
    """What a user reads first: both sides, the difference and the margin, and go or no-go."""
    outcome = state["outcome"]
    seeds = f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
    sizes = f"{settings.steps} steps of {settings.batch} x {settings.length} tokens"
    out = [
        f"{state['asked']['model'][:24]}: {seeds}, {sizes}, rank {settings.rank}",
        *_choice(state["choice"], settings.length),
    ]
    if "runs" in state:
        out += [*_sides(state, settings), *_difference(state, settings)]
    else:
        out.append(_least(state["choice"]))
    return [*out, f"{'GO' if outcome['go'] else 'NO-GO'}: {outcome['reason']}"]


def _row(name: str, *cells: str) -> str:
    return f"  {name:10s}{''.join(f'{cell:24s}' for cell in cells)}".rstrip()


def _choice(choice: Mapping[str, Any], length: int) -> list[str]:
    counts = Counter(layer["method"] for layer in choice["layers"])
    told = [f"{name} in {count} of {counts.total()}" for name, count in counts.most_common()]
    seconds = choice["seconds"]
    fastest = min((s["seconds"], name) for name, s in seconds.items() if not _is_exact(name))
    ratio = seconds[choice["exact"]]["seconds"] / fastest[0]
    return [
        _row("layers", ", ".join(told)),
        _row("attention", f"{fastest[1]} {ratio:.2f} times as fast as exact at {length} tokens"),
    ]


def _least(choice: Mapping[str, Any]) -> str:
    """Why nothing was chosen: the least error of each layer over its noise."""
    least = [np.nanmin([*layer["errors"].values(), np.inf]) for layer in choice["layers"]]
    ratios = np.asarray(least) / [layer["noise"] for layer in choice["layers"]]
    span = f"{ratios.min():.2g} to {ratios.max():.2g}"
    within = f"{(ratios <= SHARE).sum()} of {len(ratios)} layers"
    return _row("error", f"{span} of the noise; up to {SHARE:g} is taken ({within})")


def _is_exact(name: str) -> bool:
    return name.startswith(("exact", "jax."))


def _sides(state: Mapping[str, Any], settings: Settings) -> list[str]:
    outcome, times = state["outcome"], state["times"]
    ends = [f"{outcome['start']:.3f} -> {outcome[side]:.3f}" for side in SIDES]
    seconds = [_time(times[side]) for side in SIDES]
    memory = [_bytes(times[side]["temporary"]) for side in SIDES]
    return [
        _row("", *SIDES),
        _row(outcome["metric"], *ends, "held out"),
        _row("a step", *seconds, f"{outcome['speedup']:.2f} times"),
        _row("memory", *memory, "of a step"),
    ]


def _difference(state: Mapping[str, Any], settings: Settings) -> list[str]:
    outcome = state["outcome"]
    worse = outcome["worse"]
    span = f"{worse['low']:.4f} to {worse['high']:.4f}"
    watched = [run for run in state["runs"] if run["side"] == SIDES[1]]
    error = np.max([x for run in watched for x in run["error"]])
    noise = np.median([x for run in watched for x in run["noise"]])
    stop = "never" if outcome["stop"] is None else f"at step {outcome['stop']}"
    mean = f"{worse['mean']:.4f} ({LEVEL:.0%}: {span})"
    return [
        _row("worse by", f"{mean}, margin {settings.margin:g} set beforehand"),
        _row("gradient", f"error up to {error:.2f}, noise {noise:.2f}; it said stop: {stop}"),
    ]


def _time(times: Mapping[str, float]) -> str:
    scale, unit = (1, "s") if times["seconds"] >= 1 else (1000, "ms")
    return f"{scale * times['seconds']:.3g} ± {scale * times['spread'] / 2:.2g} {unit}"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.0f} MiB"
