"""The solver's command, the formulas it reads, and what it and the deciders refuse."""

import io
import math

import numpy as np
import pytest

from lora_limits import hardness
from lora_limits.hardness import dimacs, instances
from lora_limits.hardness.command import solve_command
from tests.support.neighbours import EXACT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: hardness.orthogonal_vectors([[0, 2]], [[0, 1]], EXACT),
            r"a\[0\]: got entry 2, expected 0 or 1",
        ),
        (
            lambda: hardness.orthogonal_vectors([[0, 1]], [[0.5, 1]], EXACT),
            r"b\[0\]: got entry 0.5",
        ),
        (lambda: hardness.orthogonal_vectors([[0, 1]], [[1]], EXACT), "width 1, expected 2"),
        (
            lambda: hardness.orthogonal_vectors(np.zeros((0, 2)), [[0, 1]], EXACT),
            "at least one vector",
        ),
        (lambda: hardness.orthogonal_vectors([[math.nan]], [[1]], EXACT), "nan, expected 0 or 1"),
        (lambda: hardness.orthogonal_vectors([0, 1], [[0, 1]], EXACT), "shape"),
        (
            lambda: hardness.orthogonal_vectors([[1]], [[1]], EXACT, decider="guess"),
            "decider: got 'guess'",
        ),
        (
            lambda: hardness.orthogonal_vectors([[1]], [[1]], EXACT, nodes=3),
            "expected decider='path'",
        ),
        (
            lambda: hardness.orthogonal_vectors([[1]], [[1]], EXACT, nodes=0, decider="path"),
            "at least 1",
        ),
        (lambda: hardness.nearest_neighbours([[1]], [[1]], 0, 0, EXACT), "gap: got 0, expected"),
        (
            lambda: hardness.nearest_neighbours([[1]], [[1]], 2, 1, EXACT),
            "distance: got 2, expected",
        ),
        (
            lambda: hardness.satisfiable([[1, 0]], EXACT),
            "clause 0: got literal 0, expected a non-zero integer",
        ),
        (lambda: hardness.satisfiable([[1.5]], EXACT), "non-zero integer"),
        (
            lambda: hardness.satisfiable([[x] for x in range(1, 41)], EXACT),
            "40 would take 2097152 tokens",
        ),
        (
            lambda: instances.random_neighbours(np.random.default_rng(0), 64, 8, 2, 4, False),
            "width: got 8",
        ),
        (
            lambda: instances.clustered_neighbours(np.random.default_rng(0), 64, 5, 2, 4, False),
            "width: got 5",
        ),
        (lambda: instances.random_3sat(np.random.default_rng(0), 2), "variables: got 2"),
    ],
)
def test_refusals_say_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: got the end of the file, expected 'p cnf"),
        ("1 2 0\n", "line 1: got '1', expected 'p cnf VARIABLES CLAUSES' before"),
        ("c hi\np cnf 2\n", "line 2: got 'p cnf 2', expected 'p cnf"),
        ("p cnf 2 -1\n", "line 1: .* expected 'p cnf"),
        ("p cnf 1 1\np cnf 1 1\n1 0\n", "line 2: got a second 'p' line"),
        ("p cnf 2 1\n1 x 0\n", "line 2: got 'x', expected an integer"),
        ("p cnf 2 1\n\n1 3 0\n", "line 3: got literal 3, expected a variable from 1 to 2"),
        ("p cnf 2 1\n1 2\n", "line 2: got the end of the file, expected 0"),
        ("p cnf 2 2\n1 2 0\n", "line 2: got 1 clauses, expected 2"),
        ("p cnf 10 1\n1_0 0\n", "line 2: got '1_0', expected an integer"),
        ("p cnf 2 1\n\uff11 0\n", "line 2: got '\uff11', expected an integer"),
        ("p cnf \uff12 1\n1 0\n", "line 1: got 'p cnf \uff12 1', expected"),
    ],
)
def test_dimacs_errors_name_the_line(text, message):
    with pytest.raises(ValueError, match=message):
        dimacs.parse(text)


def test_dimacs_reads_what_solvers_read():
    formula = dimacs.parse("c comment\np cnf 4 3\n1 -2\n 3 0 -1 0\n0\n%\n0\n")
    assert formula == dimacs.Formula(4, [[1, -2, 3], [-1], []])


def test_solve_prints_a_model_that_satisfies(tmp_path, capsys):
    path = tmp_path / "yes.cnf"
    path.write_text("p cnf 4 3\n1 2 0\n-1 2 0\n-2 -3 0\n")
    assert solve_command(str(path)) == 10
    out = capsys.readouterr().out
    assert "SATISFIABLE" in out
    assert "UNSATISFIABLE" not in out
    model = [int(x) for line in out.splitlines() if line.startswith("v ") for x in line[2:].split()]
    assert model[-1] == 0
    assert [abs(x) for x in model[:-1]] == [1, 2, 3, 4]
    assert hardness.satisfies(model, [[1, 2], [-1, 2], [-2, -3]])
    for word in ("gradients", "tokens", "R / ln L", "seconds"):
        assert word in out


def test_solve_says_unsatisfiable_and_reports_errors_in_one_line(tmp_path, capsys):
    path = tmp_path / "no.cnf"
    path.write_text("p cnf 1 2\n1 0\n-1 0\n")
    assert solve_command(str(path)) == 20
    assert "s UNSATISFIABLE" in capsys.readouterr().out
    for name, text in (
        ("bad.cnf", "p cnf 1 1\n1 2 0\n"),
        ("missing.cnf", None),
        ("latin.cnf", b"\xff\xfe"),
    ):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        assert solve_command(str(tmp_path / name)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfp cnf 1 1\n1 0\n",
        b"c caf\xe9, \xff\xfe\x00\np cnf 1 1\n1 0\n",
        b"c a form feed\x0c2 0 and \xe2\x80\xa8 a line separator\np cnf 1 1\n1 0\n",
        b"p cnf 1 1\r\nc carriage returns\r\n1 0\r\n",
        b"p cnf 1 1\n+1 0",
    ],
)
def test_bytes_that_other_solvers_read_are_read(data):
    assert dimacs.parse(dimacs.decode(data)) == dimacs.Formula(1, [[1]])


@pytest.mark.parametrize(("clauses", "status"), [("1 1\n1 0", 10), ("1 2\n1 0 -1 0", 20)])
def test_standard_input_is_a_file_too(clauses, status, monkeypatch, capsys):
    data = io.TextIOWrapper(io.BytesIO(f"p cnf {clauses}\n".encode()))
    monkeypatch.setattr("sys.stdin", data)
    assert solve_command("-") == status
    assert capsys.readouterr().out.startswith("s SAT" if status == 10 else "s UNSAT")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"p cnf 1 1\n2 0")))
    assert solve_command("-") == 2
    assert capsys.readouterr().err.startswith("error: standard input: line 2: got literal 2")
