"""What to do, from all heads together: go, go from N tokens, change the norms first, or no."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
WORTH = 0.05  # of a training step: less is not worth a change of code
SOME = 0.25  # of the heads: fewer are not worth one either
LEAST = 0.5  # of its norms: a model that keeps less is another one, not a change of this


class Advice(NamedTuple):
    """verdict: "go", "later", "change" or "no". tokens, basis: from where it would pay, after the
    change where there is one to make, and what that rests on.
    """

    verdict: str
    tokens: int | None = None
    basis: str | None = None


def advise(diagnosis: dict[str, Any]) -> Advice:
    """The advice of a diagnosis.

    go: what pays at this length makes a training step WORTH faster. later: SOME of the heads pay,
    here or on longer texts that the model takes; from the length on at which half of these do.
    change: most heads would be within the tolerance of a method that pays, at norms of queries and
    keys that are smaller, but no less than LEAST of what they are. Else no.
    """
    rows = diagnosis["heads"]
    payoff = diagnosis.get("payoff")
    if payoff is not None and payoff["approximate"] / payoff["exact"] - 1 >= WORTH:
        return Advice("go", diagnosis["length"], "measured")
    paying = sorted((r for r in rows if r.get("pays_from")), key=lambda r: r["pays_from"])
    if len(paying) >= SOME * len(rows):
        half = paying[: (len(paying) + 1) // 2]
        # No sooner than anything is worth it: at this length it is not.
        tokens = max(half[-1]["pays_from"], diagnosis["length"] + 1)
        reached = tokens <= diagnosis["longest"]
        return Advice("later" if reached else "no", tokens, _weakest(half))
    reachable = [r for r in rows if r.get("dial") and (r["dial"]["scale"] or 0) >= LEAST]
    if len(reachable) > len(rows) / 2:
        return Advice("change", max(r["dial"]["pays_from"] for r in reachable))
    return Advice("no")


def basis(row: Row) -> str | None:
    """What the length from which a head pays rests on; None where it does not pay."""
    if row.get("refused") or not row.get("pays_from"):
        return None
    # Diagnoses of before bases were told apart carry errors on from the windows' length.
    return row.get("basis") or ("measured" if row["verdict"] == "now" else "extrapolated")


def _weakest(rows: Sequence[Row]) -> str:
    found = {basis(row) for row in rows}
    return next(b for b in ("extrapolated", "end to end", "measured") if b in found)


def commonest(rows: Sequence[Row]) -> str:
    """The method that is named most often."""
    return Counter(row["method"] for row in rows).most_common(1)[0][0]
