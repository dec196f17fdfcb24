"""A bad argument of the programs beside `lora-limits`: one line, and status 2."""

import sys

import pytest

from experiments.data import make_minilm_heads, make_smollm2_heads
from paper_figures.command.main import main as figures
from paper_figures.gallery.__main__ import main as gallery


@pytest.mark.parametrize(
    ("command", "argv", "said"),
    [
        (figures, ["--resuts", "here"], "unrecognized arguments: --resuts"),
        (gallery, ["--minutes"], "--minutes: expected at least one argument"),
        (make_minilm_heads.main, ["--windows", "2.5"], "--windows: got '2.5', expected an integer"),
        (make_minilm_heads.main, ["--layers", "6"], "--layers: got 6, expected one of 0, 1, 2, "),
        (make_smollm2_heads.main, ["--tokens", "x"], "--tokens: got 'x', expected an integer"),
        (make_smollm2_heads.main, ["--layers", "x"], "--layers: got 'x', expected an integer"),
        (make_smollm2_heads.main, ["--heads", "1.5"], "--heads: got '1.5', expected an integer"),
    ],
)
def test_it_is_refused_in_one_line(command, argv, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}")
    assert told.count("\n") == 1
