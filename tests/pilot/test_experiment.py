"""The experiment of pilots: its names, sizes of one pilot alone, and a whole one at smoke size."""

import pytest

from experiments import pilot
from experiments.__main__ import main
from experiments.runner import store
from experiments.runner.note import load
from tests.support import ROOT


def test_a_pilot_may_have_sizes_of_its_own():
    config = load(ROOT / "configs" / "pilot.toml", "full").config
    points = {p["pilot"]: p for p in pilot.points(config)}
    assert points["made 256 polynomial 2"]["steps"] == config.steps == 60
    own = points["smollm2 512 polynomial 2"]
    assert (own["steps"], own["batch"], own["seeds"]) == (20, 2, 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("made 256 polynomial 2; paces 3", "got 'paces 3' in"),
        ("made 256 polynomial 2; steps", "got 'steps' in"),
        ("made 256 polynomial 2; steps 0", "got 'steps 0' in"),
        ("minilm 513 polynomial 2", "got 'minilm 513 polynomial 2', expected one of"),
        ("other 256 polynomial 2", "got 'other 256 polynomial 2', expected one of"),
    ],
)
def test_other_names_are_refused_in_one_line(tmp_path, capsys, name, said):
    config = str(ROOT / "configs" / "pilot.toml")
    assert main([config, "--pilots", name, "--out", str(tmp_path / "rows")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_it_runs_at_smoke_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(ROOT / "configs" / "pilot.toml"), "--smoke", "--out", "rows"]) == 0
    (row,) = store.read("rows")
    sides = {run["side"] for run in row["metrics"]["runs"]}
    assert sides == {"exact", "approximate"}
    assert row["metrics"]["outcome"]["go"] is False
