"""Lines of the results table: time, operations, memory."""

from __future__ import annotations

from typing import Any

from paper_figures import scaling
from paper_figures.gallery.saying import (
    Line,
    Rows,
    listed,
    over_seeds,
    plain,
    points,
    spread,
    times,
)

BIG = 2**20


def _scaling(rows: Rows, case: str, length: int) -> str:
    (m,) = points(rows, case=case, length=length)
    ratio = times(m["methods"][m["best"]], m["methods"]["polynomial"])
    return f"{ratio}, relative error {over_seeds(m, 'error')}"


def adapters(rows: Rows) -> list[Line]:
    """Two and three adapters against the fastest exact gradient."""
    common = "`Polynomial(3)` against the best exact gradient, d = 8, Gamma = 1"
    two = "query and value adapters"
    return [
        (f"{common}, L = 16384, {two}", _scaling(rows, "partial", 16384)),
        (f"the same at L = 65536, {two}", _scaling(rows, "partial", 65536)),
        ("query, key and value adapters, L = 16384", _scaling(rows, "full", 16384)),
        ("short sequences: L = 512, two adapters", _scaling(rows, "partial", 512)),
        ("L = 512, three adapters", _scaling(rows, "full", 512)),
    ]


def exponents(rows: Rows) -> list[Line]:
    """Of time and counted operations, fitted from L = 2048 on, and temporary memory."""
    lines = []
    for quantity, what in (
        ("seconds", "time exponent in L"),
        ("operations", "operations, counted: exponent in L"),
    ):
        told = []
        for method in ("polynomial", "exact"):
            fit = scaling.exponent(*scaling.series(rows, "partial", method, quantity))
            if fit is not None:
                told.append(
                    f"{spread(*fit)} {method}" if fit[1] > 5e-3 else f"{fit[0]:.2f} {method}"
                )
        lines.append((f"{what}, from L = 2048 on", listed(told)))
    lengths, memory = scaling.series(rows, "partial", "polynomial", "temporary")
    ends = [(n, b) for n, b in zip(lengths, memory, strict=True) if n in (2048, BIG)]
    told = [f"{plain(b / 1e6)} MB at L = {n:,}" for n, b in ends]
    return [*lines, ("temporary memory of the polynomial gradient", listed(told))]


def grid(rows: Rows) -> list[Line]:
    """MultiLayer's largest problem, by degree."""
    m = max(points(rows, panel="grid"), key=lambda p: p["length"])
    best = m["methods"][m["best"]["gradient"]]["gradient"]
    ours = {n: x for n, x in m["methods"].items() if x["family"] == "polynomial"}
    told = [
        f"degree {n.split()[1]}: {times(best, x['gradient'])} at gradient error {over_seeds(x, 'error')}"
        for n, x in ours.items()
    ]
    rates = [f"{m['attained'][name]:.0%}" for name in ours]
    problem = f"MultiLayer's problem, d = {m['width']}, L = {m['length']}, query adapter"
    return [
        (problem, "; ".join(told)),
        ("of the rate of this machine's products of that shape, those attain", listed(rates)),
    ]


def long(rows: Rows) -> list[Line]:
    """A million tokens on this machine."""
    (m,) = points(rows, panel="long", length=BIG)
    (name,) = m["methods"]
    gradient = m["methods"][name]["gradient"]
    seconds = spread(gradient["seconds"], gradient["spread"] / 2, " s")
    told = (
        f"{seconds}, {plain(m['to_square'][name])} times one 2048^3 product; "
        f"{plain(gradient['temporary'] / 1e6)} MB of temporaries"
    )
    return [(f"{name} on 2^20 tokens, d = 8, two adapters", told)]


def rivals(rows: Rows) -> list[Line]:
    """What one would pick instead at the same number of features."""
    (m,) = points(rows, panel="length", length=16384)
    ours = m["methods"]["polynomial 3"]
    told = []
    for name, label in (
        ("favor", "FAVOR+"),
        ("nystrom", "Nystrom"),
        ("chain", "the literal chain"),
    ):
        rival = m["methods"][f"{name} {3 if name == 'chain' else ours['features']}"]
        ratio = ours["gradient"]["seconds"] / rival["gradient"]["seconds"]
        told.append(f"{label}: error {over_seeds(rival, 'error')}, {plain(ratio)} times as fast")
    what = f"instead of degree 3 (error {over_seeds(ours, 'error')}) at k = {ours['features']}, L = 16384"
    return [(what, "; ".join(told))]


def _accelerator(rows: Rows, length: int) -> tuple[str, dict[str, Any]]:
    (m,) = points(rows, length=length)
    return m["device"], {n: x for n, x in m["methods"].items() if x.get("seconds")}


def accelerator(rows: Rows) -> list[Line]:
    """Beside the kernels of an accelerator."""
    lines = []
    for exponent in (19, 20):
        device, methods = _accelerator(rows, 2**exponent)
        exact = {n: x for n, x in methods.items() if x["family"] == "exact"}
        best = min(exact, key=lambda n: exact[n]["seconds"])
        ours = methods["degree 3"]
        told = f"{plain(1e3 * ours['seconds'])} ms; {times(exact[best], ours)} as fast as {best} "
        told += f"({exact[best]['dtype']}), the fastest exact one"
        single = {n: x for n, x in exact.items() if x["dtype"] == "float32" and n != best}
        if single:
            name = min(single, key=lambda n: single[n]["seconds"])
            told += f", {times(single[name], ours)} as {name} (float32)"
        error = ours.get("error") or ours.get("estimated_error")
        told += f"; error {plain(error)}" + ("" if ours.get("error") else " at most, estimated")
        lines.append((f"degree 3 on one {device}, d = 8, Gamma = 1, L = 2^{exponent}", told))
    return lines


def overtaken(rows: Rows) -> list[Line]:
    """Between which lengths the fastest exact kernel falls behind."""
    ahead = []
    for row in rows:
        _, methods = _accelerator([row], row["point"]["length"])
        exact = min(x["seconds"] for x in methods.values() if x["family"] == "exact")
        ahead.append((row["point"]["length"], exact > methods["degree 3"]["seconds"]))
    ahead.sort()
    last = max(length for length, won in ahead if not won)
    first = min(length for length, _ in ahead if length > last)
    return [("degree 3 overtakes every exact kernel there", f"between L = {last:,} and {first:,}")]


def rates(rows: Rows) -> list[Line]:
    """The width needed as a power of L."""
    told = [
        f"{plain(p['exponent'])} at {p['kappa']:g}"
        for p in points(rows, panel="counted", power=64)
        if p["kappa"] in (0.1, 0.3, 1.0)
    ]
    return [("log k / log L counted at d = log2 L, L = 2^64, by Gamma / sqrt(ln L)", listed(told))]
