"""The one runner of all sweeps: resumption, shards, and what a kill leaves behind."""

import fcntl
import json
import math
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.runner import store, telling
from lora_limits.instruments import compiling
from tests.support.tools import refusal
from tests.support.written import lines, outcomes


def test_a_sweep_writes_rows_and_a_manifest(toy, capsys):
    assert main(["toy.toml"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "results: results/toy/rows.jsonl (7 ok, 0 failed)"
    )
    rows = store.read("results/toy")
    assert [row["point"] for row in rows] == [
        {"length": length, "gamma": 1.0} for length in range(1, 8)
    ]
    assert {(row["experiment"], row["version"], row["status"]) for row in rows} == {
        ("tests.support.toy_experiment", 1, "ok")
    }
    assert rows[3]["metrics"]["value"] == 2.0
    assert rows[4]["metrics"]["value"] == math.inf
    assert math.isnan(rows[4]["metrics"]["nested"][0]["nan"])
    assert rows[4]["metrics"]["nested"][0]["low"] == -math.inf
    assert '"value": "inf"' in lines("results/toy/rows.jsonl")[4]
    manifest = json.loads(Path("results/toy/manifest.json").read_text())
    assert manifest["config"]["lengths"] == [1, 2, 3, 4, 5, 6, 7]
    assert manifest["argv"] == ["toy.toml"]
    assert manifest["versions"]["numpy"]
    assert {"commit", "dirty", "device", "cpus", "x64", "started", "size"} <= manifest.keys()
    assert manifest["runs"] == []


def test_room_is_made_for_programs_after_every_point_that_is_measured(toy, monkeypatch):
    made = []
    monkeypatch.setattr(compiling, "make_room", lambda: made.append(1))
    main(["toy.toml", "--lengths", "1", "2"])
    assert len(made) == 2
    main(["toy.toml", "--lengths", "1", "2"])
    assert len(made) == 2


def test_the_manifest_keeps_the_runs_before_and_rows_name_their_run(toy):
    for lengths in (["1"], ["1", "2"], ["1", "2", "3"]):
        main(["toy.toml", "--out", "here", "--lengths", *lengths])
    manifest = json.loads(Path("here/manifest.json").read_text())
    runs = [*manifest["runs"], manifest]
    assert [run["config"]["lengths"] for run in runs] == [[1], [1, 2], [1, 2, 3]]
    assert [row["run"] for row in store.read("here")] == [run["run"] for run in runs]
    assert [len(run.get("planned", ())) for run in runs] == [0, 0, 3]
    assert sorted(path.name for path in Path("here").iterdir()) == ["manifest.json", "rows.jsonl"]


def test_failed_points_are_recorded_and_retried_only_on_demand(toy, capsys):
    flags = ["toy.toml", "--out", "out", "--failing", "2", "6"]
    assert main(flags) == 1
    failed = [row for row in store.read("out") if row["status"] == "failed"]
    assert [row["point"]["length"] for row in failed] == [2, 6]
    assert failed[0]["error"] == {
        "type": "MemoryError",
        "message": "length 2 is too much\nfor the toy",
    }
    said = capsys.readouterr().out
    assert "[6/7] length=6 gamma=1.0: failed, MemoryError: length 6 is too much, " in said
    assert "toy: 2 points failed\n  length=2 gamma=1.0: failed, MemoryError: length 2 is" in said
    again = "python -m experiments toy.toml --out out --failing 2 6 --retry"
    assert said.splitlines()[-1] == f"measure them again: {again}"
    # No number depends on `failing`: the same points, which can now be measured.
    assert main(["toy.toml", "--out", "out"]) == 1
    assert len(lines("out/rows.jsonl")) == 7
    capsys.readouterr()
    assert main(["toy.toml", "--out", "out", "--retry", "--shard", "1/1"]) == 0
    assert "5 of 7 points are there already" in capsys.readouterr().out
    assert len(lines("out/rows-1-of-1.jsonl")) == 2
    assert {row["status"] for row in store.read("out")} == {"ok"}


def test_rows_that_are_there_are_skipped_and_a_longer_list_adds_to_them(toy):
    main(["toy.toml", "--out", "out"])
    before = lines("out/rows.jsonl")
    assert main(["toy.toml", "--out", "out"]) == 0
    assert lines("out/rows.jsonl") == before
    main(["toy.toml", "--out", "out", "--lengths", "7", "8", "8"])
    assert len(lines("out/rows.jsonl")) == len(store.read("out")) == 8


def test_all_that_a_module_may_leave_out_has_a_default(toy, tmp_path, capsys):
    """And what it may not is named, with what to write."""
    (tmp_path / "least.py").write_text(
        "from experiments.runner.config import Fields\n"
        "class Config(Fields):\n    lengths: tuple[int, ...]\n    factor: float = 2.0\n"
        "def points(config):\n    return [{'length': n} for n in config.lengths]\n"
        "def measure(point, config):\n    return {'grown': point['length'] * config.factor}\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "least.py").rename(tmp_path / "mine" / "least.py")
    Path("least.toml").write_text('experiment = "mine.least"\n[default]\nlengths = [1, 2]\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert main(["least.toml"]) == 0
        assert "claim: none" in capsys.readouterr().out
        (row,) = [row for row in store.read("results/least") if row["point"] == {"length": 2}]
        assert (row["version"], row["metrics"]) == (1, {"grown": 4.0})
        # Every field is in the key unless POINTS says otherwise.
        assert row["fields"] == {"lengths": [1, 2], "factor": 2.0}
        (tmp_path / "mine" / "less.py").write_text("Config = points = 1\n")
        Path("less.toml").write_text('experiment = "mine.less"\n[default]\nlengths = [1, 2]\n')
        assert refusal(capsys, "less.toml").endswith(
            "which has no measure; expected in it measure(point, config) -> dict, the metrics of "
            "one point"
        )
    for name in ("mine", "mine.least", "mine.less"):
        sys.modules.pop(name, None)


def test_shards_together_make_the_whole(toy, capsys):
    main(["toy.toml", "--out", "whole"])
    for shard in ("1/3", "2/3", "3/3"):
        assert main(["toy.toml", "--out", "parts", "--shard", shard]) == 0
    assert "results: parts/rows-3-of-3.jsonl (2 ok, 0 failed)" in capsys.readouterr().out
    assert outcomes("parts") == outcomes("whole")
    assert len(list(Path("parts").glob("manifest-*-of-3.json"))) == 3
    assert sum(len(lines(path)) for path in Path("parts").glob("rows-*.jsonl")) == 7
    assert main(["toy.toml", "--out", "parts"]) == 0
    assert lines("parts/rows.jsonl") == []


def test_two_writers_of_one_file_are_refused(toy, capsys):
    Path("out").mkdir()
    with open("out/rows.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refusal(capsys, "toy.toml", "--out", "out").startswith(
            "out/rows.jsonl: got a file that another process"
        )
        assert main(["toy.toml", "--out", "out", "--shard", "1/2"]) == 0
    assert main(["toy.toml", "--out", "out"]) == 0


def test_an_interrupted_sweep_says_that_it_can_go_on(toy, capsys):
    assert main(["toy.toml", "--out", "out", "--lengths", "1", "999", "2"]) == 130
    interrupted = "interrupted: the same command goes on with the points that are left\n"
    assert capsys.readouterr().err.endswith(interrupted)
    assert [row["point"]["length"] for row in store.read("out")] == [1]


def test_a_terminal_gets_a_bar_and_the_failures(toy, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["toy.toml", "--out", "out", "--failing", "2"]) == 1
    printed = capsys.readouterr().out
    assert "7/7" in printed
    assert "length=7 gamma=1.0" in printed
    assert "length=2 gamma=1.0: failed, MemoryError: length 2 is too much" in printed
    assert "results: out/rows.jsonl (6 ok, 1 failed)\n" in printed


@pytest.mark.parametrize(("theirs", "own"), [({"x": 1, "gone": 2}, {"x": 1}), ({}, {"gone": 2})])
def test_a_field_of_one_side_alone_names_the_other_folder(theirs, own):
    """An experiment that changed while its version did not."""
    plans = [{"experiment": "e", "version": 1, "fields": fields} for fields in (theirs, own)]
    command = telling.elsewhere(["e.toml"], Path("rows"), *plans)
    assert command.split()[-1].startswith("rows-gone-")
