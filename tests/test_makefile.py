"""What `make figures` does after a failure, and which targets touch results."""

import os
import shutil
import subprocess

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")
# In place of the environment's Python: says what it was asked for, and fails where it was told to.
STAND_IN = """#!/bin/sh
echo "$@" >> calls
case "$*" in
*--minutes*) ;;
"-m experiments"*) exit ${SWEPT:-0} ;;
"-m paper_figures"*) exit ${DRAWN:-0} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make(target, answer=..., SWEPT=..., DRAWN=...) -> (exit status, what was printed, calls)."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()

    def run(target, answer="", **environment):
        done = subprocess.run(
            ["make", "--no-print-directory", target, "VENV=venv"],
            cwd=tmp_path,
            input=answer,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        calls = tmp_path / "calls"
        return done.returncode, done.stdout, calls.read_text() if calls.exists() else ""

    return run


def test_figures_are_drawn_after_a_failure_which_still_fails_the_target(make):
    status, _, calls = make("figures", SWEPT="1")
    assert status == 2  # make's own, for a command that failed
    swept, drawn = calls.splitlines()[-2:]
    assert swept.startswith("-m experiments configs/phase_boundary.toml configs/norm_rank.toml")
    assert drawn.endswith("--results results --out results/figures")
    assert make("figures")[0] == 0
    assert make("figures", DRAWN="1")[0] == 2


def test_an_interrupted_sweep_ends_make_figures(make):
    status, _, calls = make("figures", SWEPT="130")
    assert status == 2
    assert calls.splitlines()[-1].startswith("-m experiments")


def test_results_are_removed_by_a_target_of_their_own_and_after_a_yes(make, tmp_path):
    rows = tmp_path / "results" / "scaling" / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("hours of work")
    for target, answer in (("clean", "y"), ("clean-results", "n"), ("clean-results", "")):
        assert make(target, answer)[0] == 0
        assert rows.exists()
    status, printed, _ = make("clean-results", "y\n")
    assert (status, printed[:24], printed[-9:]) == (0, "remove results/ for good", " removed\n")
    assert not rows.exists()
    assert make("clean-results")[1] == "there is no results/\n"
