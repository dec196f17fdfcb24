"""The theorem ledger: every statement of the paper, its verdict, and evidence made on the spot."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from lora_limits.ledger import (
    approximation,
    corrections,
    decoders,
    definitions,
    exactness,
    limits,
    printing,
)
from lora_limits.ledger.row import VERDICTS, Evidence, Row

__all__ = ["LEDGER", "VERDICTS", "Evidence", "Row", "examine", "theorems_command"]

# The sections of the printed ledger, in the paper's order.
SECTIONS: dict[str, tuple[Row, ...]] = {
    "Definitions and the reduced problem (Sections 1 to 3)": definitions.ROWS,
    "Exact gradients (Lemmas 3.1, 3.2; Appendices C, D, F)": exactness.ROWS,
    "The almost linear algorithm (Lemmas 3.3 to 3.7, Theorems 3.1 and A.1)": approximation.ROWS,
    "Hardness (Theorem 4.1, Appendix E)": limits.ROWS,
    "Taken literally (errata, Appendix G)": corrections.ROWS,
    "What carries over to decoders (beyond the paper)": decoders.ROWS,
}
LEDGER: tuple[Row, ...] = tuple(row for rows in SECTIONS.values() for row in rows)


def examine(row: Row) -> Evidence:
    """Runs the check of a row in float64, whatever the precision outside: a second at most."""
    with jax.enable_x64(True):
        return row.check()


def theorems_command(words: Sequence[str] = (), as_json: bool = False) -> int:
    """Prints the ledger, a row as soon as it is measured: for people, or as lines of JSON.

    words: only the rows whose number or statement contains them, as one phrase, in any case.
    Returns 0; 1 if any row's check fails (one that raises fails, and shows its error); 2, after one
    line on stderr, if no row contains the words. All rows take 10 to 40 seconds, most of it
    compilation.
    """
    phrase = " ".join(words)
    chosen = {title: _containing(phrase, rows) for title, rows in SECTIONS.items()}
    rows = [row for section in chosen.values() for row in section]
    if not rows:
        expected = "words of a row's number or statement"
        print(f"error: filter: got {phrase!r}, expected {expected}", file=sys.stderr)
        return 2
    if as_json:
        failed = sum(_tell_json(row) for row in rows)
    else:
        printing.say(printing.wrapped(_opening(rows), 0))
        failed = sum(_tell_section(title, section) for title, section in chosen.items() if section)
        printing.say(printing.wrapped(_summary(rows, failed), 0))
    return 1 if failed else 0


def _containing(phrase: str, rows: tuple[Row, ...]) -> list[Row]:
    sought = phrase.casefold()
    told = [(row, row.number.casefold(), row.statement.casefold()) for row in rows]
    return [row for row, number, statement in told if sought in number or sought in statement]


def _outcome(row: Row) -> Evidence:
    try:
        return examine(row)
    except Exception as error:
        # One broken check must not hide the others.
        return Evidence(f"{type(error).__name__}: {error}", False)


def _tell_json(row: Row) -> bool:
    """Prints a row as a line of JSON; whether it failed."""
    evidence = _outcome(row)
    printing.say([printing.json_line(row, evidence)])
    return not evidence.holds


def _tell_section(title: str, rows: list[Row]) -> int:
    """Prints a section, the statement of a row before its check runs; the number that failed."""
    failed = 0
    printing.say(printing.title_lines(title))
    for row in rows:
        printing.say(printing.statement_lines(row))
        evidence = _outcome(row)
        printing.say(printing.evidence_lines(row, evidence))
        failed += not evidence.holds
    return failed


def _opening(rows: list[Row]) -> str:
    whole = f"; all {len(LEDGER)} take 10 to 40 seconds" if len(rows) > 5 else ""
    return f"{len(rows)} of {len(LEDGER)} statements, measured now in float64{whole}."


def _summary(rows: list[Row], failed: int) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    many, bad = ("" if count == 1 else "s" for count in (len(rows), failed))
    return f"{len(rows)} statement{many}: {told}. {failed} check{bad} failed."
