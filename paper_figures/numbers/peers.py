"""The tables of peers: what is said of every method, who is better, and the polynomial alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from paper_figures.drawing.statistics import exponent
from paper_figures.drawing.tables import markdown

# JamesSand/MultiLayer (arXiv 2408.13233): milliseconds of its exact and degree-2 forward on its own
# CPU, by d.
PUBLISHED = {
    4: (1.01, 0.71),
    6: (2.19, 0.85),
    8: (12.2, 1.29),
    9: (47.3, 1.79),
    10: (192.0, 7.2),
    11: (808.0, 20.0),
    12: (3297.0, 41.8),
}
NAMES = {
    "exact": "best exact",
    "polynomial": "polynomial",
    "certified": "with certificate",
    "chain": "literal chain",
    "favor": "FAVOR+",
    "nystrom": "Nyström",
}
# of the panels of rivals: HyperAttention, Thinformer and kNN attention beside the library's own
RIVALS = {
    "hyper": "HyperAttention",
    "thinformer": "Thinformer",
    "knn": "kNN attention",
    "polynomial": "polynomial",
    "tree": "block tree",
    "sparse": "sparse + low rank",
}
COMMON = (
    "gradient, ms (certified)",
    "speed-up (certified)",
    "speed-up, forward",
    "worst gradient error",
    "max error",
    "forward error",
    "bound",
    "MB",
    "compile, s",
    "loses to",
)
Rows = list[dict[str, Any]]


def panel(rows: Rows, name: str) -> Rows:
    """Rows of one panel by length."""
    return sorted(
        (r for r in rows if r["point"]["panel"] == name), key=lambda r: r["point"]["length"]
    )


def seconds_of(metrics: dict[str, Any], name: str, part: str = "gradient") -> float | None:
    return metrics["methods"].get(name, {}).get(part, {}).get("seconds")


def names_of(metrics: dict[str, Any], family: str) -> list[str]:
    """The methods of a family that have an error, by features."""
    methods = metrics["methods"]
    return sorted(
        (n for n, m in methods.items() if m["family"] == family and "error" in m),
        key=lambda n: methods[n]["features"] or int(n.split()[1]),
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


def table(rows: Rows) -> str:
    """Markdown: MultiLayer's grid beside its published figures, every approximation over L, the
    polynomial alone.

    Errors are relative, the worst of the seeds but for the forward one. "loses to": exact, where
    that is faster; zero, whose error is 1; another, faster and nearer.
    """
    head = ("d", "L", "best exact, ms", "degree (k)", *COMMON)
    others = ("problem", "L", "best exact, ms", "method", "ms", "speed-up", "worst gradient error")
    parts = [
        markdown((*head, "of skinny rate", "published, forward, ms"), _grid(rows)),
        markdown(("L", "method", "k", *COMMON), _over_lengths(rows)),
        markdown(others, _rivals(rows)),
    ]
    return "\n".join(parts + _alone(rows))


def _grid(rows: Rows) -> list[list[str]]:
    """Polynomials on MultiLayer's problems."""
    lines = []
    for row in panel(rows, "grid"):
        d = row["point"]["width"]
        length = row["point"]["length"]
        metrics = row["metrics"]
        best = metrics["best"].get("gradient", "")
        times = PUBLISHED.get(d)
        told = f"{times[0]:g} / {times[1]:g} = {times[0] / times[1]:.3g}" if times else ""
        exact = f"{best}: {1e3 * (seconds_of(metrics, best) or np.nan):.3g}"
        for name in names_of(metrics, "polynomial"):
            share = metrics["attained"].get(name)
            rate = "" if share is None else f"{share:.0%}"
            degree = f"{name.split()[1]} ({metrics['methods'][name]['features']})"
            own = [str(d), str(length), exact, degree]
            lines.append([*own, *figures(metrics, name), rate, told])
    return lines


def _over_lengths(rows: Rows) -> list[list[str]]:
    """Every approximation at every length."""
    lines = []
    for row in panel(rows, "length"):
        metrics = row["metrics"]
        for family in ("polynomial", "chain", "favor", "nystrom"):
            for name in names_of(metrics, family):
                k = str(metrics["methods"][name]["features"])
                own = [str(row["point"]["length"]), NAMES[family], k]
                lines.append([*own, *figures(metrics, name)])
    return lines


def _rivals(rows: Rows) -> list[list[str]]:
    """Other subquadratic methods, and the library's own, on one tame problem and one real head."""
    lines = []
    for row in panel(rows, "rivals"):
        metrics = row["metrics"]
        best = metrics["best"]["gradient"]
        exact = f"{best}: {1e3 * (seconds_of(metrics, best) or np.nan):.3g}"
        own = [row["point"]["problem"], str(row["point"]["length"]), exact]
        for name in (n for family in RIVALS for n in names_of(metrics, family)):
            seconds = 1e3 * (seconds_of(metrics, name) or np.nan)
            speed_up = metrics["speed_up"]["gradient"].get(name, np.nan)
            error = metrics["methods"][name]["error"]
            lines.append([*own, name, f"{seconds:.3g}", f"{speed_up:.3g}", f"{error:.2g}"])
    return lines


def _alone(rows: Rows) -> list[str]:
    """Tables of the polynomial alone: over L, beside the products of the same run, and its compile
    time by degree.
    """
    long = []
    compiled = []
    times = []
    for row in panel(rows, "long"):
        metrics = row["metrics"]
        length = row["point"]["length"]
        for name, method in metrics["methods"].items():
            own = method["gradient"]
            whole = method["certified"]
            times.append((length, own["seconds"]))
            cells = [
                1e3 * own["seconds"],
                1e3 * whole["seconds"],
                method.get("bound", np.nan),
                own["temporary"] / 1e6,
                metrics["to_square"][name],
            ]
            long.append(
                [str(length), *(f"{x:.3g}" for x in cells), f"{metrics['attained'][name]:.0%}"]
            )
    for row in (r for r in rows if r["point"]["panel"] == "compile"):
        (method,) = row["metrics"]["methods"].values()
        seconds = [f"{method[part]['compile']:.2g}" for part in ("gradient", "certified")]
        compiled.append([str(row["point"]["degree"]), *seconds])
    fit = exponent([n for n, _ in times], [t for _, t in times])
    title = "gradient, ms" + (f": exponent {fit[0]:.2f} ± {fit[1]:.2f}" if fit else "")
    head = ("L", title, "certified, ms", "bound", "MB", "of 2048^3 product", "of skinny rate")
    return [
        markdown(head, long),
        markdown(("degree", "compile, s", "certified, s"), compiled),
    ]
