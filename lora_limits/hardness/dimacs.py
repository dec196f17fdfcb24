"""DIMACS CNF: `c` comments, a `p cnf VARIABLES CLAUSES` line, clauses of integers ending in 0."""

from __future__ import annotations

import dataclasses
import re
from typing import NoReturn

from lora_limits.checks import fail

# Python's own int() also takes 1_0 and the digits of other scripts, which no other solver reads.
INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclasses.dataclass(frozen=True)
class Formula:
    """clauses: lists of non-zero integers, in size at most `variables`, the number declared."""

    variables: int
    clauses: list[list[int]]


def fail_at(line: int, got: str, expected: str) -> NoReturn:
    """Raises ValueError for a line of the text."""
    fail(f"line {line}", got, expected)


def _header(line: int, words: list[str]) -> tuple[int, int]:
    counts = [word for word in words[2:] if word.isascii() and word.isdecimal()]
    if len(words) != 4 or words[:2] != ["p", "cnf"] or len(counts) != 2:
        fail_at(line, repr(" ".join(words)), "'p cnf VARIABLES CLAUSES'")
    return int(words[2]), int(words[3])


def _literal(line: int, word: str, variables: int) -> int:
    if not INTEGER.fullmatch(word):
        fail_at(line, repr(word), "an integer")
    value = int(word)
    if abs(value) > variables:
        fail_at(line, f"literal {value}", f"a variable from 1 to {variables}, as declared")
    return value


def decode(data: bytes) -> str:
    """The text of a file's bytes: UTF-8, with or without a byte order mark.

    Other bytes become U+FFFD: in a comment, where older files have them, they do no harm, and in a
    clause they are no integer.
    """
    return data.decode("utf-8-sig", errors="replace")


def parse(text: str) -> Formula:
    """The formula of a DIMACS CNF text.

    A clause may span lines; a `%` line ends the file, as in SATLIB.
    Raises ValueError, with the line and what was expected there, for anything malformed.
    """
    header = None
    clauses = []
    open_clause = []
    number = 0
    # Not splitlines: a form feed, among others, does not end a comment.
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, raw in enumerate(lines, 1):
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
