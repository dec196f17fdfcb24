"""DIMACS CNF: `c` comments, a `p cnf VARIABLES CLAUSES` line, clauses of integers ending in 0."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from lora_limits.checks import fail


@dataclasses.dataclass(frozen=True)
class Formula:
    """clauses: lists of non-zero integers, in size at most `variables`, the number declared."""

    variables: int
    clauses: list[list[int]]


def fail_at(line: int, got: str, expected: str) -> NoReturn:
    """Raises ValueError for a line of the text."""
    fail(f"line {line}", got, expected)


def _header(line: int, words: list[str]) -> tuple[int, int]:
    if len(words) != 4 or words[:2] != ["p", "cnf"] or not all(w.isdecimal() for w in words[2:]):
        fail_at(line, repr(" ".join(words)), "'p cnf VARIABLES CLAUSES'")
    return int(words[2]), int(words[3])


def _literal(line: int, word: str, variables: int) -> int:
    try:
        value = int(word)
    except ValueError:
        fail_at(line, repr(word), "an integer")
    if abs(value) > variables:
        fail_at(line, f"literal {value}", f"a variable from 1 to {variables}, as declared")
    return value


def parse(text: str) -> Formula:
    """The formula of a DIMACS CNF text.

    A clause may span lines; a `%` line ends the file, as in SATLIB.
    Raises ValueError, with the line and what was expected there, for anything malformed.
    """
    header = None
    clauses = []
    open_clause = []
    number = 0
    for number, raw in enumerate(text.splitlines(), 1):
        words = raw.split()
        if not words or words[0].startswith("c"):
            continue
        if words[0].startswith("%"):
            break
        if words[0] == "p":
            if header is not None:
                fail_at(number, "a second 'p' line", "clauses")
            header = _header(number, words)
            continue
        if header is None:
            fail_at(number, repr(words[0]), "'p cnf VARIABLES CLAUSES' before the first clause")
        # 0 ends a clause, wherever on a line it stands.
        for literal in (_literal(number, word, header[0]) for word in words):
            if literal:
                open_clause.append(literal)
            else:
                clauses.append(open_clause)
                open_clause = []
    if header is None:
        # Lines are numbered from 1, so the end is one after the last.
        fail_at(number + 1, "the end of the file", "'p cnf VARIABLES CLAUSES'")
    if open_clause:
        fail_at(number, "the end of the file", "0 to close the last clause")
    if len(clauses) != header[1]:
        fail_at(number, f"{len(clauses)} clauses", f"{header[1]}, as declared")
    return Formula(header[0], clauses)
