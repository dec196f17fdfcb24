"""Lines of the results table: both promises at length, and the attacks on the certified one."""

from __future__ import annotations

from paper_figures.gallery.saying import Line, Rows, listed, span


def bounds(rows: Rows) -> list[Line]:
    """Each promise and the error of the worst array, degree by degree, at the longest length."""
    plain = [row for row in rows if "length" in row["point"]]
    longest = max(row["point"]["length"] for row in plain)
    plain = [row for row in plain if row["point"]["length"] == longest]
    lines = []
    for at, degree in enumerate(plain[0]["fields"]["degrees"]):
        told = []
        for what in ("certified", "confident", "error"):
            worst = [max(x[at] for x in row["metrics"][what].values()) for row in plain]
            told.append(f"{what} {span(worst)}")
        what = f"degree {degree} at L = {longest}, over the largest entry, worst array"
        lines.append((what, listed(told)))
    return lines


def attacks(rows: Rows) -> list[Line]:
    """How many problems there were, and how many broke a bound."""
    problems = violations = 0
    for row in rows:
        for name, tally in row["metrics"].get("families", {}).items():
            # a problem of the attack by families has a kind, a twist and a target: counted once
            if row["point"]["attack"] != "families" or name.startswith("kind: "):
                problems += tally["problems"]
                violations += tally["violations"]
    return [("attacks on the certified bound", f"{violations} of {problems:,} problems violate it")]
