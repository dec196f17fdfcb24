"""DIMACS CNF: `c` comments, a `p cnf VARIABLES CLAUSES` line, then clauses of integers that end
with 0.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn


@dataclasses.dataclass(frozen=True)
class Formula:
    """variables: as declared, 1..variables; clauses: lists of non-zero integers within that
    range.
    """

    variables: int
    clauses: list[list[int]]


def fail(line: int, got: str, expected: str) -> NoReturn:
    raise ValueError(f"line {line}: got {got}, expected {expected}")


def _header(line: int, words: list[str]) -> tuple[int, int]:
    if len(words) != 4 or words[:2] != ["p", "cnf"] or not all(w.isdecimal() for w in words[2:]):
        fail(line, repr(" ".join(words)), "'p cnf VARIABLES CLAUSES'")
    return int(words[2]), int(words[3])


def _literal(line: int, word: str, variables: int) -> int:
    try:
        value = int(word)
    except ValueError:
        fail(line, repr(word), "an integer")
    if abs(value) > variables:
        fail(line, f"literal {value}", f"a variable from 1 to {variables}, as declared")
    return value


def parse(text: str) -> Formula:
    """The formula of a DIMACS CNF text. A clause may span lines; a `%` line ends the file, as in
    SATLIB.

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
                fail(number, "a second 'p' line", "clauses")
            header = _header(number, words)
            continue
        if header is None:
            fail(number, repr(words[0]), "'p cnf VARIABLES CLAUSES' before the first clause")
        for literal in (_literal(number, word, header[0]) for word in words):
            if literal:
                open_clause.append(literal)
            else:
                clauses.append(open_clause)
                open_clause = []
    if header is None:
        fail(number + 1, "the end of the file", "'p cnf VARIABLES CLAUSES'")
    if open_clause:
        fail(number, "the end of the file", "0 to close the last clause")
    if len(clauses) != header[1]:
        fail(number, f"{len(clauses)} clauses", f"{header[1]}, as declared")
    return Formula(header[0], clauses)
