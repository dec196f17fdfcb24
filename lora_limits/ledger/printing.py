"""How the ledger is told: in lines of the terminal's width, or in lines of JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable

from lora_limits.ledger.row import Evidence, Row

# Where verdicts begin, two columns after the longest number of the paper's statements.
VERDICT_COLUMN = 28
# The narrowest lines: below it words would be cut to pieces.
NARROWEST = 32
BOLD, DIM, RED = "1", "2", "1;31"


def width() -> int:
    """Characters a line: COLUMNS, else the terminal's width, else 80."""
    return max(shutil.get_terminal_size((80, 24)).columns, NARROWEST)


def coloured() -> bool:
    """Whether to colour: on a terminal only, and never where NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def styled(text: str, style: str) -> str:
    """The text in a style of the terminal (SGR codes), where it is coloured at all."""
    return f"\x1b[{style}m{text}\x1b[0m" if coloured() else text


def wrapped(text: str, indent: int, style: str = "") -> list[str]:
    """Lines of the text, indented; no longer than `width` whatever the text is."""
    margin = " " * indent
    lines = textwrap.wrap(text, width() - indent, break_on_hyphens=False)
    return [margin + (styled(line, style) if style else line) for line in lines]


def title_lines(title: str) -> list[str]:
    """The head of a section, between empty lines."""
    lines = wrapped(title, 0, BOLD)
    return ["", *lines, "-" * min(len(title), width()), ""]


def statement_lines(row: Row) -> list[str]:
    """What is known of a row before it is measured: number, verdict, statement."""
    gap = " " * max(VERDICT_COLUMN - len(row.number), 2)
    if len(row.number + gap + row.verdict) <= width():
        head = [styled(row.number, BOLD) + gap + row.verdict]
    else:
        head = [*wrapped(row.number, 0, BOLD), *wrapped(row.verdict, 0)]
    return head + wrapped(row.statement, 2)


def evidence_lines(row: Row, evidence: Evidence) -> list[str]:
    """What was measured, red where it fails; the test that tries it harder, the figure of it."""
    mark, style = ("", "") if evidence.holds else ("FAILS: ", RED)
    lines = wrapped(mark + evidence.measured, 4, style)
    path, _, test = row.test.partition("::")
    parts = [path, f"::{test}", f", figure {row.figure}" if row.figure else ""]
    return [*lines, *_pointers(parts), ""]


def _pointers(parts: list[str]) -> list[str]:
    """Parts of one line, broken between them only: many a test's name nearly fills a line."""
    lines = [""]
    for part in parts:
        if len(lines[-1] + part) > width() - 4:
            lines.append("")
            part = part.removeprefix(", ")
        lines[-1] += part
    return [line for text in lines for line in wrapped(text, 4, DIM)]


def json_line(row: Row, evidence: Evidence) -> str:
    """The row as one object of JSON: number, statement, verdict, holds, measured, test, figure."""
    told = {
        "number": row.number,
        "statement": row.statement,
        "verdict": row.verdict,
        "holds": bool(evidence.holds),
        "measured": evidence.measured,
        "test": row.test,
        "figure": row.figure,
    }
    return json.dumps(told, ensure_ascii=False)


def say(lines: Iterable[str]) -> None:
    """Prints at once, also into a pipe."""
    for line in lines:
        print(line)
    sys.stdout.flush()
