"""What is told of the way: every line that a log gets, and the bar of a terminal."""

import sys

import pytest

from lora_limits.instruments import progress as telling
from lora_limits.instruments.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: the list's only entry, in seconds."""
    now = [100.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_stage_and_one_now_and_then(clock, capsys):
    """And minutes left at the pace after the first step, which took twice the time."""
    with Progress() as progress:
        progress.stage("loading")
        progress.stage("measuring", 5)
        for seconds in (60.0, 30.0, 5.0, 30.0):
            clock[0] += seconds
            progress.step()
    assert capsys.readouterr().err.splitlines() == [
        "loading ...",
        "measuring ...",
        "measuring (1 of 5)",
        "measuring (2 of 5, about 2 min left)",
        "measuring (4 of 5, about 0 min left)",
    ]


def test_what_was_done_before_is_no_part_of_the_pace(clock, capsys):
    """A run that goes on from its 40th step of 60, a minute each."""
    with Progress() as progress:
        progress.at(0, 60, "choosing")
        progress.at(40, 60, "training")
        clock[0] += 120
        progress.at(42, 60, "training")
    assert capsys.readouterr().err.splitlines() == [
        "choosing (0 of 60)",
        "training (42 of 60, about 18 min left)",
    ]


def test_a_terminal_gets_one_bar_that_is_gone_in_the_end(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as progress:
        progress.stage("loading")
        progress.stage("measuring", 5)
        progress.step()
        progress.at(3, 5, "said")
        (task,) = progress._bar.tasks
        assert (task.description, task.completed, task.total) == ("said", 3, 5)
    told = capsys.readouterr().err
    assert "..." not in told
    assert told.endswith("\x1b[2K")  # the line of the bar, erased


def test_the_quiet_say_nothing(capsys):
    with Progress(quiet=True) as progress:
        progress.stage("loading")
        progress.at(0, 1, "loading")
        progress.step()
    assert capsys.readouterr().err == ""
