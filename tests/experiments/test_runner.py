"""The one runner of all sweeps: resumption, shards, and what a kill leaves behind."""

import fcntl
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import Refused
from experiments.__main__ import main
from experiments.runner import store
from tests.support import ROOT, toy_experiment
from tests.support.tools import refusal
from tests.support.toy_experiment import NOTE


def outcome(row):
    return {
        name: row.get(name)
        for name in ("key", "experiment", "version", "point", "status", "metrics", "error")
    }


def outcomes(folder):
    """Everything in a folder's rows but the seconds; through JSON, for NaN is not equal to
    itself.
    """
    return sorted(json.dumps(outcome(row)) for row in store.read(folder))


def lines(path):
    return Path(path).read_text().splitlines()


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


def test_a_row_carries_every_field_it_depends_on(toy):
    main(["toy.toml", "--smoke", "--out", "out", "--seed", "3"])
    (row,) = store.read("out")
    assert row["fields"] == {"series": "taylor", "seed": 3, "offset": None, "title": ""}
    assert row["key"] == store.key(row["experiment"], 1, row["fields"], row["point"])


@pytest.mark.parametrize(
    ("flags", "got", "folder"),
    [
        (["--seed", "1"], "with seed = 0, expected with seed = 1", "out-seed-1"),
        (["--title", "a b"], "with title = , expected with title = a b", "out-title-a-b"),
        (
            ["--offset=0.5", "--series", "chebyshev"],
            "with series = taylor, offset = None, expected with series = chebyshev, offset = 0.5",
            "out-series-chebyshev",
        ),
    ],
)
def test_a_folder_of_another_plan_is_refused_with_the_command_that_works(
    toy, capsys, flags, got, folder
):
    main(["toy.toml", "--out", "out"])
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    said = refusal(capsys, "toy.toml", "--out", "out", *flags)
    refused, _, command = said.partition("; try: python -m experiments ")
    assert refused == f"out: got results {got}"
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert main(shlex.split(command)) == 0
    assert len(store.read(folder)) == 7
    capsys.readouterr()
    # Without its manifest too: the rows say it.
    Path("out/manifest.json").unlink()
    assert refusal(capsys, "toy.toml", "--out", "out", *flags).startswith(f"out: got results {got}")


def test_a_folder_of_another_version_or_experiment_or_of_old_rows_is_refused(
    toy, capsys, monkeypatch
):
    main(["toy.toml", "--out", "out"])
    monkeypatch.setattr(toy_experiment, "VERSION", 2)
    capsys.readouterr()
    said = refusal(capsys, "toy.toml", "--out", "out")
    assert said.startswith("out: got results of version 1, expected of version 2; try: ")
    assert said.endswith("toy.toml --out out-v2")
    monkeypatch.setattr(toy_experiment, "VERSION", 1)
    row = json.loads(lines("out/rows.jsonl")[0])
    for changes, got in (
        ({"experiment": "scaling"}, "of scaling, expected of tests.support.toy_experiment"),
        ({"fields": None}, "without the fields they depend on, expected with the fields"),
    ):
        Path("other").mkdir(exist_ok=True)
        foreign = {name: x for name, x in (row | changes).items() if x is not None}
        Path("other/rows.jsonl").write_text(json.dumps(foreign) + "\n")
        assert refusal(capsys, "toy.toml", "--out", "other").startswith(f"other: got results {got}")
        assert len(lines("other/rows.jsonl")) == 1


def test_measure_cannot_read_a_field_that_no_key_holds(toy, capsys, monkeypatch):
    """Else a changed field would find the rows of the old one."""
    main(["toy.toml", "--out", "out"])
    real = toy_experiment.measure
    monkeypatch.setattr(
        toy_experiment, "measure", lambda p, c: real(p, c) | {"longest": max(c.lengths)}
    )
    capsys.readouterr()
    assert main(["toy.toml", "--out", "other"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "tests.support.toy_experiment: measure reads lengths, which POINTS names; "
        "take it out of POINTS\n"
    )
    assert lines("other/rows.jsonl") == []


def test_what_is_read_beside_the_config_is_part_of_the_key(toy, capsys, monkeypatch):
    monkeypatch.setattr(toy_experiment, "inputs", lambda config: {"text": "ab12"}, raising=False)
    main(["toy.toml", "--out", "out"])
    assert store.read("out")[0]["fields"]["text"] == "ab12"
    monkeypatch.setattr(toy_experiment, "inputs", lambda config: {"text": "cd34"})
    capsys.readouterr()
    said = refusal(capsys, "toy.toml", "--out", "out")
    assert said.startswith("out: got results with text = ab12, expected with text = cd34; try: ")
    monkeypatch.setattr(toy_experiment, "inputs", lambda config: {"title": "ab12"})
    said = refusal(capsys, "toy.toml", "--out", "out")
    assert said.endswith("toy_experiment: inputs names title, expected no field's name")


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


@pytest.mark.parametrize(
    "torn", ['{"key": "ab', '{"key": "ab", "status": "ok"}', '{"key": "a\n', "\0\0\0\n"]
)
def test_a_torn_last_line_is_dropped(toy, torn):
    main(["toy.toml", "--out", "out"])
    whole = outcomes("out")
    kept = lines("out/rows.jsonl")[:4]
    Path("out/rows.jsonl").write_text("\n".join(kept) + "\n" + torn)
    assert len(store.read("out")) == 4
    assert main(["toy.toml", "--out", "out"]) == 0
    assert lines("out/rows.jsonl")[:4] == kept
    assert outcomes("out") == whole


@pytest.mark.parametrize("bad", ["{", "", "[1]", "{}", '{"key": "ab", "status": "odd"}'])
def test_any_other_bad_line_is_an_error(toy, capsys, bad):
    main(["toy.toml", "--out", "out"])
    path = Path("out/rows.jsonl")
    changed = [*lines(path)[:2], bad, *lines(path)[3:]]
    path.write_text("\n".join(changed) + "\n")
    capsys.readouterr()
    assert refusal(capsys, "toy.toml", "--out", "out").startswith("out/rows.jsonl:3: got ")
    assert lines(path) == changed
    with pytest.raises(Refused, match=r"rows\.jsonl:3"):
        store.read("out")


def test_a_folder_that_is_not_there_and_a_manifest_that_is_none_are_errors(toy, capsys):
    with pytest.raises(Refused, match="no such folder"):
        store.read("nowhere")
    Path("out").mkdir()
    Path("out/manifest.json").write_text("[]")
    assert refusal(capsys, "toy.toml", "--out", "out").startswith(
        "out/manifest.json: got a file that is not a manifest"
    )


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


def test_metrics_that_are_not_json_make_a_failed_row(toy, monkeypatch):
    monkeypatch.setattr(
        toy_experiment,
        "measure",
        lambda point, config: {"value": {1, 2}} if point["length"] == 1 else 3,
    )
    assert main(["toy.toml", "--lengths", "1", "2", "--out", "out"]) == 1
    assert [row["error"]["type"] for row in store.read("out")] == ["TypeError", "TypeError"]


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


def test_the_key_is_that_of_the_point_the_version_and_what_is_shared():
    base = store.key("toy", 1, {"seed": 0}, {"a": 1, "b": 2.5})
    assert base == store.key("toy", 1, {"seed": 0}, {"b": 2.5, "a": 1})
    assert len(base) == 16
    others = [
        ("yot", 1, {"seed": 0}, 1),
        ("toy", 2, {"seed": 0}, 1),
        ("toy", 1, {"seed": 1}, 1),
        ("toy", 1, {}, 2),
    ]
    keys = {
        store.key(name, version, shared, {"a": a, "b": 2.5}) for name, version, shared, a in others
    }
    assert len(keys | {base}) == 5


def python(*argv, cwd=ROOT, env=None):
    command = [sys.executable, *argv]
    streams = {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=cwd, env=env, timeout=60, check=False, **streams)


def program(*argv):
    """The runner's main as a program that can be run from any folder."""
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    return f"{path}; from experiments.__main__ import main; status = main({argv!r})"


SCALING = str(ROOT / "configs" / "scaling.toml")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["--list"], 0),
        (["toy.toml", "--help"], 0),
        ([SCALING, "--size", "huge"], 2),
        ([SCALING, "--shard", "3/2"], 2),
        (["toy.toml", "--lengths", "x"], 2),
        (["toy.toml", "--smoke"], 0),
    ],
)
def test_jax_is_not_imported_needlessly(toy, argv, status):
    """Experiments import it at their top, but what can be refused without them is."""
    done = python(
        "-c", program(*argv) + "; assert 'jax' not in sys.modules; sys.exit(status)", cwd=Path.cwd()
    )
    assert done.returncode == status, done.stderr


def test_no_experiment_computes_anything_when_it_is_imported():
    """An array made then would have the precision of before X64 is set: there is no backend here to
    make one on.
    """
    names = [p.stem for p in (ROOT / "experiments").glob("*.py") if not p.stem.startswith("__")]
    assert len(names) > 10
    code = "import " + ", ".join(f"experiments.{name}" for name in names)
    nowhere = {**os.environ, "JAX_PLATFORMS": "none"}
    done = python("-c", code, env=nowhere)
    assert done.returncode == 0, done.stderr
    assert python("-c", code + ", jax; jax.numpy.ones(1)", env=nowhere).returncode == 1


def test_the_module_runs_as_a_program(tmp_path):
    assert "usage: python -m experiments" in python("-m", "experiments", "--help").stdout
    done = python("-m", "experiments", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_an_experiment_sets_the_precision_of_its_run(tmp_path):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "wide.py").write_text(
        "import jax.numpy as jnp\n"
        "from experiments.runner.config import Fields as Config\nVERSION, X64 = 1, True\n"
        "def points(config):\n    return [{}]\n"
        "def measure(point, config):\n    return {'dtype': str(jnp.ones(1).dtype)}\n"
    )
    note = NOTE.partition("lengths")[0].replace("tests.support.toy_experiment", "toys.wide")
    (tmp_path / "toy.toml").write_text(note)
    done = python("-c", program("toy.toml", "--out", "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["x64"] is True
    assert manifest["device"]["platform"]
    assert [row["metrics"] for row in store.read(tmp_path / "out")] == [{"dtype": "float64"}]
