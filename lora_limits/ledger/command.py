"""The theorem ledger: every statement of the paper, its verdict, and the evidence measured on the
spot.
"""

from __future__ import annotations

import sys

import jax

from lora_limits.ledger import approximation, corrections, definitions, exactness, limits
from lora_limits.ledger.row import VERDICTS, Evidence, Row

__all__ = ["LEDGER", "VERDICTS", "Evidence", "Row", "examine", "theorems_command"]

# the sections of the printed ledger, in the paper's order
SECTIONS: dict[str, tuple[Row, ...]] = {
    "Definitions and the reduced problem (Sections 1 to 3)": definitions.ROWS,
    "Exact gradients (Lemmas 3.1, 3.2; Appendices C, D, F)": exactness.ROWS,
    "The almost linear algorithm (Lemmas 3.3 to 3.7, Theorems 3.1 and A.1)": approximation.ROWS,
    "Hardness (Theorem 4.1, Appendix E)": limits.ROWS,
    "Taken literally (errata, Appendix G)": corrections.ROWS,
}
LEDGER: tuple[Row, ...] = tuple(row for rows in SECTIONS.values() for row in rows)


def examine(row: Row) -> Evidence:
    """Runs the check of a row in float64, whatever the precision outside. About a second at
    most.
    """
    with jax.enable_x64(True):
        return row.check()


def theorems_command() -> int:
    """Prints the ledger, each row as soon as its section is measured; 1 if any row's check fails,
    else 0.

    A check that raises counts as failed and shows its error. Takes 10 to 40 seconds, most of it
    compilation.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    failed = 0
    for title, rows in SECTIONS.items():
        found = [_outcome(row) for row in rows]
        failed += sum(not evidence.holds for evidence in found)
        console.print(_table(title, rows, found))
    counts = ", ".join(f"{sum(row.verdict == v for row in LEDGER)} {v}" for v in VERDICTS)
    console.print(f"{len(LEDGER)} statements: {counts}. {failed} checks failed.", highlight=False)
    return 1 if failed else 0


def _outcome(row: Row) -> Evidence:
    try:
        return examine(row)
    except Exception as error:  # one broken check must not hide the others
        return Evidence(f"{type(error).__name__}: {error}", False)


def _table(title: str, rows: tuple[Row, ...], found: list[Evidence]):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, ratio in (
        ("number", 3),
        ("statement", 6),
        ("verdict", 3),
        ("measured", 6),
        ("test", 6),
        ("figure", 2),
    ):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row, evidence in zip(rows, found, strict=True):
        measured = Text(evidence.measured if evidence.holds else f"FAILS: {evidence.measured}")
        measured.stylize("" if evidence.holds else "bold red")
        cells = (
            row.number,
            row.statement,
            row.verdict,
            measured,
            row.test.removeprefix("tests/"),
            row.figure,
        )
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table
