"""`lora-limits theorems`: what is printed of a row, for whoever reads it, and the filter."""

import json

import pytest

from lora_limits.ledger import (
    command,
    printing,
    row,
)


def broken():
    raise ArithmeticError("no evidence")


GOOD = row.Row(
    "Good", "two is two", "holds", lambda: row.Evidence("gap 0", True), "tests/x.py::test_x", "f"
)


BAD = row.Row("Bad", "one is two", "fails as printed", broken, "tests/x.py::test_x")
LONG = row.Row(
    "Lemma 3.14",
    "a statement that goes on for longer than a line of the terminal, and [brackets] that are none "
    "of a markup's",
    "conditional on SETH",
    lambda: row.Evidence(" ".join(["error 1.0e-16 <= bound 2.0e-16;"] * 5), True),
    "tests/hardness/test_hardness.py::test_quadrature_error_stays_below_its_bound_and_misses_the_gap",
    "hardness",
)


@pytest.fixture
def told(monkeypatch, capsys):
    """The status, and what `theorems_command` prints of three rows in two sections."""
    monkeypatch.setattr(command, "SECTIONS", {"Some": (GOOD, BAD), "Others": (LONG,)})
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments):
        return command.theorems_command(*arguments), *capsys.readouterr()

    return run


def test_the_command_prints_every_row_and_its_status_tells_a_failure(told):
    status, printed, _ = told()
    assert status == 1
    assert all(entry.number in printed for entry in (GOOD, BAD, LONG))
    assert "FAILS: ArithmeticError: no evidence" in printed
    summary = "3 statements: 1 holds, 1 fails as printed, 1 conditional on SETH. 1 check failed."
    assert printed.split()[-len(summary.split()) :] == summary.split()
    status, printed, _ = told(["two is"])
    assert status == 0
    assert "FAILS" not in printed
    assert "\x1b" not in printed  # colours are for terminals


@pytest.mark.parametrize("columns", [None, 40, 80, 100])
def test_no_line_is_longer_than_the_terminal(told, monkeypatch, columns):
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    _, printed, _ = told()
    longest = max(len(line) for line in printed.splitlines())
    assert (columns or 80) * 0.8 < longest <= (columns or 80)
    words = " ".join(printed.split())
    assert LONG.statement in words
    assert LONG.check().measured in words
    assert LONG.test in "".join(printed.split())


def test_a_row_is_printed_before_the_next_is_measured(told, monkeypatch, capsys):
    seen = []

    def check():
        seen.append(capsys.readouterr().out)
        return row.Evidence("gap 0", True)

    later = row.Row("Later", "three is three", "holds", check, "tests/x.py::test_x")
    monkeypatch.setattr(command, "SECTIONS", {"Some": (GOOD, later)})
    assert told()[0] == 0
    assert "gap 0" in seen[0]
    assert "Later" in seen[0]  # one sees what is being measured


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["lemma 3"], ["Lemma 3.14"]),
        (["LEMMA", "3.1"], ["Lemma 3.14"]),
        (["IS TWO"], ["Good", "Bad"]),
        ([], ["Good", "Bad", "Lemma 3.14"]),
    ],
)
def test_the_filter_takes_numbers_and_statements_in_any_case(told, words, numbers):
    _, printed, _ = told(words, True)
    assert [json.loads(line)["number"] for line in printed.splitlines()] == numbers


def test_a_filter_that_finds_nothing_is_refused_in_one_line(told):
    status, printed, said = told(["Lemma", "17"])
    assert (status, printed, said.count("\n")) == (2, "", 1)
    assert "got 'Lemma 17', expected" in said


def test_json_lines_say_what_the_rows_say(told):
    status, printed, said = told([], True)
    good, bad, long = (json.loads(line) for line in printed.splitlines())
    assert (status, said) == (1, "")
    assert good == {
        "number": "Good",
        "statement": "two is two",
        "verdict": "holds",
        "holds": True,
        "measured": "gap 0",
        "test": "tests/x.py::test_x",
        "figure": "f",
    }
    assert (bad["holds"], bad["measured"]) == (False, "ArithmeticError: no evidence")
    assert long["statement"] == LONG.statement


def test_every_row_of_the_paper_fits_its_lines(monkeypatch):
    """Without measuring: numbers, verdicts, statements, tests and figures."""
    monkeypatch.setenv("COLUMNS", "80")
    for entry in command.LEDGER:
        lines = printing.statement_lines(entry)
        assert len(lines[0].split("  ")) > 1  # number and verdict on one line
        lines += printing.evidence_lines(entry, row.Evidence("0", True))
        assert max(len(line) for line in lines) <= 80
        path, _, name = entry.test.partition("::")
        assert any(path in line for line in lines)
        assert f"::{name}" in "".join(line.strip() for line in lines)
