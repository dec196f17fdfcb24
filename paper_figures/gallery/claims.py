"""Every number that README.md and the gallery print, stored beside the rows that it comes from.

data/claims.json holds the lines of both tables as they were last written. `parted` recomputes them
from the rows and holds them against that file and both pages.
"""

from __future__ import annotations

import json

from paper_figures.command.finding import STORED
from paper_figures.gallery import front, page, results

NAME = "claims.json"


def recomputed() -> dict[str, list[list[str]]]:
    """{page: the lines of its table}, from the kept rows."""
    return {"README.md": front.table(results.kept), "paper_figures/README.md": results.lines()}


def write() -> None:
    """Both pages and the claims."""
    found = recomputed()
    page.PATH.write_text(page.text(found["paper_figures/README.md"]), encoding="utf-8")
    readme = front.PATH.read_text(encoding="utf-8")
    front.PATH.write_text(front.written(readme, found["README.md"]), encoding="utf-8")
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (STORED / NAME).write_text(text + "\n", encoding="utf-8")


def parted() -> list[str]:
    """One line for every claim that the rows no longer make, and for every page that says otherwise."""
    stored = json.loads((STORED / NAME).read_text(encoding="utf-8"))
    found = recomputed()
    told = []
    for name, lines in found.items():
        before = {line[0]: line for line in stored.get(name, [])}
        after = {line[0]: line for line in lines}
        for what in [*after, *(what for what in before if what not in after)]:
            got, expected = before.get(what), after.get(what)
            if got != expected:
                told.append(f"{name}: {what}: got {_cell(got)}, expected {_cell(expected)}")
    readme = front.PATH.read_text(encoding="utf-8")
    pages = {
        front.PATH: front.written(readme, found["README.md"]) == readme,
        page.PATH: page.PATH.read_text(encoding="utf-8")
        == page.text(found["paper_figures/README.md"]),
    }
    told += [
        f"{path.relative_to(front.PATH.parent)}: not what the rows say; write it: make gallery"
        for path, same in pages.items()
        if not same
    ]
    return told


def count() -> int:
    """How many claims are stored."""
    stored = json.loads((STORED / NAME).read_text(encoding="utf-8"))
    return sum(len(lines) for lines in stored.values())


def _cell(line: list[str] | None) -> str:
    return "nothing" if line is None else repr(" | ".join(line[1:]))
