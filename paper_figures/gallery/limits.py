"""Lines of the results table: the boundary, what a guarantee costs, hardness, real heads."""

from __future__ import annotations

import math

import numpy as np

from paper_figures import levels as levels_figure
from paper_figures.drawing import boundary
from paper_figures.gallery.saying import Line, Rows, listed, plain, points, span

RIGHT = 0.1  # a gradient is of use whose largest error is a tenth of its largest entry


def crossings(rows: Rows) -> list[Line]:
    """Where k* = L at d = log2 L, by family, at the longest sequence that has a crossing."""
    cells = points(rows, kind="accuracy", slice="growing")
    lines = []
    for tolerance, label in (("1/L", "1/L"), ("1%", "1 %")):
        told = []
        for family in dict.fromkeys(p["family"] for p in cells):
            mine = boundary.select(cells, family=family)
            curve = boundary.width_crossing(mine, tolerance, level=1.0)
            if curve is None:
                told.append(f"nowhere for {family}")
                continue
            at = f"{plain(2 ** curve.mean[-1])} (L = 2^{round(curve.x[-1])})"
            told.append(f"{family} {at}")
        if told:
            what = f"R / ln L at which k* = L, d = log2 L, relative error {label}, by family"
            lines.append((what, listed(told)))
    return lines


def law(rows: Rows) -> list[Line]:
    """The constant of the law for each family, and how far cells are from it."""
    cells = points(rows, kind="accuracy")
    told = []
    for family in dict.fromkeys(p["family"] for p in cells):
        found = boundary.fit(boundary.select(cells, family=family))
        if found is not None:
            off = np.std([p["measured"] - p["predicted"] for p in found.cells])
            told.append(f"{family} {plain(found.share)} (exponent off by {off:.2f})")
    what = "effective radius over the bound R, by family: the degree needed is that of rho = c R"
    return [(what, listed(told))] if told else []


def boundary_speed(rows: Rows) -> list[Line]:
    """Speed-up at relative error 1/L by R / ln L, at the longest length that was timed."""
    times = points(rows, kind="time", slice="growing")
    cells = points(rows, kind="accuracy", slice="growing", family="uniform", seed=0)
    if not times or not cells:
        return []
    clock = boundary.clock(times)
    assert clock is not None
    lengths = {p["length"] for p in cells} & {p["length"] for p in times}
    longest = max(lengths)
    slower = boundary.slowdown(clock, "1/L")
    told = []
    for p in sorted(boundary.select(cells, length=longest), key=lambda p: p["gamma"]):
        ratio = float(np.exp(-slower(p)))
        if ratio > 0:
            told.append(f"{plain(ratio)} at {plain(p['score_ratio'])}")
    what = f"speed-up over the best exact gradient at relative error 1/L, uniform, L = {longest}"
    return [(f"{what}, by R / ln L", listed(told))]


def counted(rows: Rows) -> list[Line]:
    """log k* / log L far beyond what runs."""
    found = points(rows, kind="counted", slice="growing", log2_length=64)
    told = [f"{plain(p['exponent'])} at {p['ratio']:g}" for p in found]
    what = "log k* / log L by the bound, counted at d = log2 L, L = 2^64, by Gamma / sqrt(ln L)"
    return [(what, listed(told))]


def certificates(rows: Rows) -> list[Line]:
    """Bound over error by adapter and series, where the gradient is of use; violations."""
    lines = []
    for series in ("taylor", "chebyshev", "fitted"):
        ratios = _ratios(rows, series)
        told = [f"{plain(np.median(ratios[name]))} {name}" for name in sorted(ratios)]
        what = (
            f"certified bound over true error, {series.capitalize()} series, medians over degrees "
        )
        lines.append((f"{what}2, 4, 6 where the gradient is right to 10 %", listed(told)))
    violations, checked = (
        sum(row["metrics"][n] for row in rows) for n in ("violations", "checked")
    )
    kinds = len({row["point"]["kind"] for row in rows})
    told = f"{violations} of {checked:,}, over {kinds} families of inputs"
    return [*lines, ("certified bounds below the true error", told)]


def _ratios(rows: Rows, series: str) -> dict[str, list[float]]:
    """{adapter array: bound / error}, the two arrays of queries and of keys pooled."""
    out: dict[str, list[float]] = {}
    for p in points(rows, series=series):
        worst = np.max(list(p["errors"].values()), axis=0)
        for name, errors in p["errors"].items():
            adapter, half = name.split(".")
            label = f"{adapter} {half.upper()}" if adapter == "value" else adapter
            for i, j in np.argwhere(worst <= RIGHT):
                error, bound = errors[i][j], p["bounds"][name][i][j]
                # an error within the rounding of what it is measured by tells nothing
                if (
                    p["degrees"][j] in (2, 4, 6)
                    and error > p["guards"][name][i]
                    and np.isfinite(bound)
                ):
                    out.setdefault(label, []).append(bound / error)
    return out


def real_heads(rows: Rows) -> list[Line]:
    """Norms of real heads, and the features that polynomials need there."""
    found = points(rows)
    # Rows of the first version are of the encoder alone, at 512 tokens.
    kinds = {(p.get("model", "encoder"), p.get("length", 512)): [] for p in found}
    for p in found:
        kinds[p.get("model", "encoder"), p.get("length", 512)].append(p)
    lines = []
    for (model, length), heads in kinds.items():
        who = f"{len(heads)} real heads of the {model}, L = {length}"
        lines += _norms_and_features(who, heads)
    return lines


def _norms_and_features(who: str, heads: Rows) -> list[Line]:
    """The lines of the heads of one model at one length."""
    ratios = [p["gamma_ratio"] for p in heads]
    scores = [p["score_ratio"] for p in heads]
    above = sum(ratio > 1 for ratio in ratios)
    norms = [
        (f"{who}: Gamma / sqrt(ln L)", f"{span(ratios)}, {above} above 1"),
        (f"{who}: R / ln L, centred", span(scores)),
    ]
    if "needed" not in heads[0]:
        return norms
    layers = sorted({p["layer"] for p in heads})
    cut = [
        plain(
            np.median([p["score_std"] / p["score_std_centred"] for p in heads if p["layer"] == n])
        )
        for n in layers
    ]
    needed = sorted(p["needed"]["0.1"]["features"] or np.inf for p in heads)
    reached = [k for k in needed if math.isfinite(k)]
    told = f"out of reach for {len(needed) - len(reached)}"
    if reached:
        middle = float(np.median(needed))
        half = f"{plain(middle)} the median" if np.isfinite(middle) else "no degree the median"
        told = f"{plain(reached[0], 5)} for the tamest, {half}, {told}"
    return [
        *norms,
        (
            f"{who}: centring divides scores' spread by (layers {listed([str(n) for n in layers])})",
            listed(cut),
        ),
        (f"{who}: features of a polynomial at 10 % error", told),
    ]


def hardness(rows: Rows) -> list[Line]:
    """Where the exact oracle decides right, and what the quadratures miss."""
    exact = points(rows, panel="decision", family="exact")
    sizes = listed([str(n) for n in sorted({p["n"] for p in exact})])
    least = {}
    for kind in ("random", "clustered"):
        wrong = [p["strength"] for p in exact if p[f"right_{kind}"] < 1]
        least[kind] = min(p["strength"] for p in exact if p["strength"] > max(wrong))
    count = sum(p["decisions"] for p in exact)
    told = (
        f"right on every random instance from {least['random']:g} of the Gamma it needs on, on the "
    )
    told += f"worst case from {least['clustered']:g} (n = {sizes}; {count} decisions)"
    quadrature = points(rows, panel="quadrature")
    rules = [
        f"{label} {span([p[name] for p in quadrature], 1)}"
        for name, label in (
            ("left_riemann", "left Riemann"),
            ("gauss_24", "Gauss-Legendre, 24 nodes"),
        )
    ]
    return [
        ("the reduction with the exact oracle", told),
        ("error of the path integral, 1/16 allowed", listed(rules)),
    ]


def norms(rows: Rows) -> list[Line]:
    """What rank does to Gamma under both conventions of the scale, at the largest entries."""
    adapter = points(rows, kind="adapter")
    size = max(p["size"] for p in adapter)
    lines = []
    for convention in ("alpha/r", "alpha/sqrt(r)"):
        mine: dict[int, list[float]] = {}
        for p in adapter:
            if p["size"] == size and p["convention"] == convention:
                mine.setdefault(p["rank"], []).append(p["gamma"])
        told = [f"{plain(float(np.mean(x)))} at r = {rank}" for rank, x in sorted(mine.items())]
        lines.append(
            (f"Gamma with adapter entries of size {size:g}, scale {convention}", listed(told))
        )
    return lines


def chain(rows: Rows) -> list[Line]:
    """Bounds of the lemmas over what they bound, for polynomials."""
    ratios: dict[str, list[float]] = {"terms": [], "gradients": []}
    for p in points(rows):
        if p["factor"] != "svd":
            for name, (error, bound, _) in p["terms"].items():
                if error > 0:
                    ratios["gradients" if "." in name else "terms"].append(bound / error)
    told = [f"{span(values)} times the error of {name}" for name, values in ratios.items()]
    return [("bounds of Lemmas 3.3 to 3.7 as corrected, polynomial factors", listed(told))]


def levels(rows: Rows) -> list[Line]:
    """Ranks beside the chain's widths, at the longest length."""
    found = points(rows, kind="family", family="uniform")
    longest = max(p["length"] for p in found)
    told = []
    for seeds in levels_figure.seeds_of([p for p in found if p["length"] == longest]):
        ranks = [p["ranks"]["1/L"]["p"] for p in seeds]
        widths = [p["widths"]["1/L"]["p"] for p in seeds]
        rank = f"{ranks[0]}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        width = "none" if None in widths else " or ".join(f"{w:,}" for w in sorted({*widths}))
        ratio = seeds[0]["gamma"] ** 2 / np.log(longest)
        told.append(f"{rank} (chain {width}) at {plain(ratio)}")
    what = f"rank of p at error 1/L, uniform, d = log2 L, L = {longest}, by R / ln L"
    heads = [p["ranks"]["1/L"]["p"] / p["tokens"] for p in points(rows, kind="head")]
    lines = [(what, listed(told))]
    if heads:
        lines.append(("rank of p over L at error 1/L, real heads", span(heads)))
    return lines
