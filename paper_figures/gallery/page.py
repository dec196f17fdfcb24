"""The page: every figure with its claim, caption, command and provenance; results; minutes."""

from __future__ import annotations

import importlib
from typing import Any

from paper_figures.command.finding import HERE, STORED, available, load
from paper_figures.drawing.tables import markdown
from paper_figures.gallery import notes, results

PATH = HERE / "README.md"
# The figure to begin with; the others follow in the order of their names.
FIRST = "phase_boundary"

HEAD = """# Figures and results

Every figure of this folder and every number below is made from the rows in `data/`; this page is
written by `python -m paper_figures.gallery` (`make gallery`), and a test holds it against the rows.
`make redraw` draws the figures again from those rows in half a minute; the command of a figure
makes the rows themselves again, in the time that the last table says.

[The checklist](../lora_limits/checklist.md) leads from these results to a decision about a model
of your own.

A manifest beside the rows says how they were made: size of the config, commit, versions, device.
Times are medians, and only ratios within a run mean anything. ± is half the interquartile range
for times, and half a 95 % interval over seeds or of a fit for everything else.
"""


def text(lines: list[list[str]]) -> str:
    """The whole page in Markdown. lines: of its table of results, as `results.lines` has them."""
    names = sorted(available(), key=lambda name: (name != FIRST, name))
    parts = [HEAD, "## Figures\n", *(_figure(name) for name in names)]
    parts += ["## Results\n", results.table(lines), "## How long each config takes\n", _minutes()]
    return "\n".join(parts)


def caption(module: Any) -> str:
    """What a figure shows, from its module's docstring; and its panels, from that of `draw`."""
    told = " ".join(f"{module.__doc__} {module.draw.__doc__ or ''}".split())
    # what follows describes the argument, for who calls it
    return _literal(told.split(" rows: ")[0])


def _literal(text: str) -> str:
    """Markdown that shows the text: the star of k* is no emphasis."""
    return text.replace("*", r"\*")


def _figure(name: str) -> str:
    """Section of a figure. A picture and rows of every figure are kept, so both are there."""
    module = importlib.import_module(f"paper_figures.{name}")
    told = notes.manifest(module.CONFIG)
    rows = load(STORED, module.CONFIG) or []
    subject = " ".join((module.__doc__ or name).split())
    lines = [f"### {name}\n", f"![{_literal(subject)}]({name}.png)\n", f"{caption(module)}\n"]
    if told is None:
        lines.append(f"**Rows.** Made by `{module.COMMAND}`.\n")
    else:
        note = notes.note(module.CONFIG)
        command = note.command + ("" if told["size"] == "default" else f" --size {told['size']}")
        lines.append(f"**Claim.** {_literal(note.claim)}\n")
        lines.append(f"**Rows.** {notes.run(told, rows)}. Made by `{command}`.\n")
    also = f", [table]({name}.md)" if hasattr(module, "table") else ""
    lines.append(f"[PDF]({name}.pdf){also}; drawn by `python -m paper_figures {name}`.\n")
    return "\n".join(lines)


def _minutes() -> str:
    """Minutes of every config by size, on two idle cores."""
    sizes = ("smoke", "default", "full")
    lines = []
    for name in notes.names():
        minutes = notes.note(name).minutes
        lines.append([f"`{name}`", *(f"{minutes[size]:g}" for size in sizes)])
    return markdown(("minutes on two idle cores", *sizes), lines)
