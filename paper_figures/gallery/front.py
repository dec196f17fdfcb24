"""What README.md says of the measurements: its first figure's law and its few results, from the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paper_figures.command.finding import HERE
from paper_figures.drawing import boundary
from paper_figures.drawing.tables import markdown
from paper_figures.gallery import limits, notes, speed, training
from paper_figures.gallery.saying import Line, Rows, over_seeds, plain, points, span, times

PATH = HERE.parent / "README.md"
# The block of the file that is written here lies between these lines.
BEGIN = "<!-- results: written by python -m paper_figures.gallery -->"
END = "<!-- end of results -->"
HEADER = ("what", "measured", "seeds", "rows")


def fast(rows: Rows) -> Line:
    """The polynomial gradient on the clock, with what is guaranteed at that speed."""
    (p,) = points(rows, case="partial", length=16384)
    best = p["methods"][p["best"]]
    ratio, certified = (times(best, p["methods"][n]) for n in ("polynomial", "certified"))
    told = f"{ratio}, relative error {over_seeds(p, 'error')}; "
    told += f"{certified} with its bound, {over_seeds(p, 'bound')} of the largest entry"
    return ("degree 3 over the best exact gradient, d = 8, Gamma = 1, L = 16384", told)


def promised(rows: Rows) -> Line:
    """Both promises at degree 4, and the error."""
    mine = [row for row in rows if row["point"].get("length") == 16384]
    degree = mine[0]["fields"]["degrees"].index(4)
    parts = []
    for what in ("certified", "confident", "error"):
        worst = [max(x[degree] for x in row["metrics"][what].values()) for row in mine]
        parts.append(f"{what} {span(worst)}")
    return ("degree 4 there, of the largest entry, worst array", ", ".join(parts))


def crossing(rows: Rows) -> Line:
    """Where k* = L, by family, at the longest length of all seeds."""
    cells = boundary.select(points(rows, kind="accuracy", slice="growing"), length=2**16)
    told = []
    for family in dict.fromkeys(p["family"] for p in cells):
        mine = boundary.select(cells, family=family)
        curve = boundary.width_crossing(mine, "1/L", level=1.0)
        if curve is None:
            continue
        mean, low, high = (plain(2 ** float(x[-1])) for x in (curve.mean, curve.low, curve.high))
        told.append(f"{mean} ({low} to {high}) {family}")
    return ("R / ln L at which k\\* = L, error 1/L, d = log2 L = 16", ", ".join(told))


def streamed(rows: Rows) -> Line | None:
    """The longest sequence, from a file."""
    found = points(rows, kind="stream")
    if not found:
        return None
    p = max(found, key=lambda p: p["length"])
    days = p["exact_seconds"] / 86400
    told = f"{plain(p['seconds'] / 60)} minutes, one round (exact, by counting: {plain(days)} days)"
    told += f"; error {plain(p['error'])}"
    if "bound" in p:
        told += f", certified {plain(p['bound'])} of the largest entry"
    power = round(np.log2(p["length"]))
    what = f"2^{power} tokens streamed from a file, degree {p['degree']}, d = {p['width']}"
    return (f"{what}, Gamma = {p['gamma']:g}", told)


def counted(rows: Rows) -> Line:
    """The exponent of the worst case, far beyond what runs."""
    found = points(rows, kind="counted", slice="growing", log2_length=64)
    told = ", ".join(f"{plain(p['exponent'])} at {p['ratio']:g}" for p in found)
    return ("log k\\* / log L by the bound, L = 2^64, by Gamma / sqrt(ln L), counted", told)


def on_a_device(rows: Rows) -> Line:
    """Beside the kernels of an accelerator."""
    what, told = speed.accelerator(rows)[-1]
    return (what, told)


def heads(rows: Rows) -> Line:
    """Norms of real heads, of the encoder."""
    return limits.real_heads(rows)[0]


def decoder_heads(rows: Rows) -> Line | None:
    """Norms of the decoder's heads, at the longest length."""
    norms = [line for line in limits.real_heads(rows) if line[0].endswith("Gamma / sqrt(ln L)")]
    return norms[-1] if "decoder" in norms[-1][0] else None


def factors(rows: Rows) -> Line | None:
    """What reaches real heads, at the longest length, and its speed there."""
    lines = training.tree(rows)
    if not lines:
        return None
    what, told = lines[-1]
    length = int(what.split("L = ")[1].split(":")[0])
    for p in points(rows, kind="time", length=length):
        best, tree = p["contenders"][p["best"]], p["contenders"]["tree 256"]
        told += f"; {times(best, tree)} as fast as the best exact gradient"
    return (what, told)


def reduction(rows: Rows) -> Line:
    """Theorem 4.1 as a program."""
    what, told = limits.hardness(rows)[0]
    return (f"Theorem 4.1: {what}", told)


def trained(rows: Rows) -> Line:
    """Training with approximate gradients."""
    what, told = training.short_runs(rows)[0]
    return (what, told)


# (config, what README says of its rows), in the order of its table
Say = Callable[[Rows], Line | None]
LINES: tuple[tuple[str, Say], ...] = (
    ("scaling", fast),
    ("promises", promised),
    ("phase_boundary", crossing),
    ("phase_boundary", streamed),
    ("phase_boundary", counted),
    ("accelerator", on_a_device),
    ("real_heads", heads),
    ("real_heads", decoder_heads),
    ("factors", factors),
    ("hardness", reduction),
    ("finetune", trained),
)


# what asks for chance less often than the rest of its config
SEEDS: dict[Say, str] = {streamed: "one seed (0)", counted: "counted"}


def table(load: Callable[[str], Rows]) -> list[list[str]]:
    """The lines of README's table, as HEADER has them. load: the kept rows of a config."""
    lines = []
    for config, say in LINES:
        rows = load(config)
        line = say(rows)
        told = notes.manifest(config)
        if line is None or told is None:
            continue
        size = "" if told["size"] == "default" else f", {told['size']}"
        changes = ", from a tree with changes" if told["dirty"] else ""
        seeds = SEEDS.get(say) or notes.seeds(told, rows)
        lines.append([*line, seeds, f"`{config}`{size}{changes}"])
    return lines


def written(page: str, lines: list[list[str]]) -> str:
    """README.md with its block written anew. Raises ValueError where the file has no such block."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: got no block of results, expected {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{markdown(HEADER, lines)}\n{END}{after}"
