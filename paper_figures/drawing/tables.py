"""Cells of the Markdown tables of peers: what is said of every method, and who is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def seconds_of(metrics: dict[str, Any], name: str, part: str = "gradient") -> float | None:
    return metrics["methods"].get(name, {}).get(part, {}).get("seconds")


def names_of(metrics: dict[str, Any], family: str) -> list[str]:
    """The methods of a family that have an error, by features."""
    methods = metrics["methods"]
    return sorted(
        (n for n, m in methods.items() if m["family"] == family and "error" in m),
        key=lambda n: methods[n]["features"],
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return (
        "\n".join(
            "| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]
        )
        + "\n"
    )


def losses(metrics: dict[str, Any], name: str) -> list[str]:
    """Who is better: "exact" if faster, "zero" if no gradient errs less, the most accurate that is
    faster as well.
    """
    methods = metrics["methods"]
    error = methods[name]["error"]
    seconds = seconds_of(metrics, name) or np.inf
    out = ["exact"] if metrics["speed_up"].get("gradient", {}).get(name, 1) < 1 else []
    out += ["zero"] if error >= 1 else []
    rivals = {n: m["error"] for n, m in methods.items() if m["family"] != "exact" and "error" in m}
    ahead = {
        n: e
        for n, e in rivals.items()
        if e < error and (seconds_of(metrics, n) or np.inf) < seconds
    }
    return out + ([min(ahead, key=lambda n: ahead[n])] if ahead else [])


def figures(metrics: dict[str, Any], name: str) -> list[str]:
    """What both tables say of a method: milliseconds, speed-up, with certificate in brackets,
    errors, bound, memory.
    """
    method = metrics["methods"][name]
    speed_up = metrics["speed_up"]
    own = [
        f"{1e3 * method[part]['seconds']:.3g}"
        for part in ("gradient", "certified")
        if "seconds" in method.get(part, {})
    ]
    ratios = [
        f"{speed_up[part][name]:.3g}"
        for part in ("gradient", "certified")
        if name in speed_up.get(part, {})
    ]
    pairs = [v[0] + (f" ({v[1]})" if len(v) > 1 else "") if v else "not run" for v in (own, ratios)]
    forward = f"{speed_up['loss'][name]:.3g}" if name in speed_up.get("loss", {}) else ""
    numbers = [
        f"{method[n]:.2g}" if method.get(n) is not None else ""
        for n in ("error", "max_error", "output_error", "bound")
    ]
    work = [f"{method['gradient']['temporary'] / 1e6:.3g}", f"{method['gradient']['compile']:.2g}"]
    loses = ", ".join(losses(metrics, name))
    return [*pairs, forward, *numbers, *work, loses]


COMMON = (
    "gradient, ms (certified)",
    "speed-up (certified)",
    "speed-up, forward",
    "gradient error",
    "max error",
    "forward error",
    "bound",
    "MB",
    "compile, s",
    "loses to",
)
