"""The one runner of all sweeps: resumption, shards, and what a kill leaves behind."""

import fcntl
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import Refused
from experiments.__main__ import main
from experiments.runner import store
from tests.support import ROOT
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


def test_the_manifest_keeps_the_runs_before(toy):
    for seed in "012":
        main(["toy.toml", "--smoke", "--out", "here", "--seed", seed])
    manifest = json.loads(Path("here/manifest.json").read_text())
    assert [run["config"]["seed"] for run in [*manifest["runs"], manifest]] == [0, 1, 2]
    assert sorted(path.name for path in Path("here").iterdir()) == ["manifest.json", "rows.jsonl"]


def test_failed_points_are_recorded_and_retried_only_on_demand(toy, capsys):
    flags = ["toy.toml", "--out", "out", "--failing", "2", "6"]
    assert main(flags) == 1
    assert (
        "6/7] length=6 gamma=1.0: failed, MemoryError: length 6 is too much, "
        in capsys.readouterr().out
    )
    failed = [row for row in store.read("out") if row["status"] == "failed"]
    assert [row["point"]["length"] for row in failed] == [2, 6]
    assert failed[0]["error"] == {
        "type": "MemoryError",
        "message": "length 2 is too much\nfor the toy",
    }
    # `failing` is not SHARED: the same points, which can now be measured.
    assert main(["toy.toml", "--out", "out"]) == 1
    assert len(lines("out/rows.jsonl")) == 7
    capsys.readouterr()
    assert main(["toy.toml", "--out", "out", "--retry", "--shard", "1/1"]) == 0
    assert "5 of 7 points are there already" in capsys.readouterr().out
    assert len(lines("out/rows-1-of-1.jsonl")) == 2
    assert {row["status"] for row in store.read("out")} == {"ok"}


def test_rows_that_are_there_are_skipped_and_other_configs_rows_stay(toy, capsys):
    main(["toy.toml", "--out", "out"])
    before = lines("out/rows.jsonl")
    assert main(["toy.toml", "--out", "out"]) == 0
    assert lines("out/rows.jsonl") == before
    main(["toy.toml", "--out", "out", "--lengths", "7", "8", "8"])
    assert len(lines("out/rows.jsonl")) == 8
    main(["toy.toml", "--out", "out", "--seed", "1"])
    assert len(lines("out/rows.jsonl")) == len(store.read("out")) == 15


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
    from tests.support import toy_experiment

    monkeypatch.setattr(
        toy_experiment, "measure", lambda point, config: {"value": {1, 2}} if config.seed else 3
    )
    assert main(["toy.toml", "--smoke", "--out", "out"]) == 1
    assert main(["toy.toml", "--smoke", "--out", "out", "--seed", "1"]) == 1
    assert [row["error"]["type"] for row in store.read("out")] == ["TypeError", "TypeError"]


def test_an_interrupted_sweep_says_that_it_can_go_on(toy, capsys):
    assert main(["toy.toml", "--out", "out", "--lengths", "1", "999", "2"]) == 130
    assert (
        capsys.readouterr().err
        == "interrupted: the same command goes on with the points that are left\n"
    )
    assert [row["point"]["length"] for row in store.read("out")] == [1]


def test_a_terminal_gets_a_bar_and_the_failures(toy, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["toy.toml", "--out", "out", "--failing", "2"]) == 1
    printed = capsys.readouterr().out
    assert "7/7" in printed
    assert "length=7 gamma=1.0" in printed
    assert "length=2 gamma=1.0: failed, MemoryError: length 2 is too much" in printed
    assert printed.splitlines()[-1].endswith("results: out/rows.jsonl (6 ok, 1 failed)")


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
        ([SCALING, "--help"], 0),
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


def test_a_sweep_killed_twenty_times_ends_like_one_left_alone(toy):
    lengths = [str(length) for length in range(1, 61)]
    flags = ["--lengths", *lengths, "--failing", "3", "17", "18", "60", "--pause", "0.02"]
    assert main(["toy.toml", "--out", "alone", *flags]) == 1
    command = [
        sys.executable,
        "-m",
        "experiments",
        str(Path("toy.toml").resolve()),
        "--out",
        str(Path("out").resolve()),
        *flags,
    ]
    draw, killed = random.Random(0), 0
    rows = Path("out/rows.jsonl")
    for _ in range(20):
        count = len(lines(rows)) if rows.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        # A moment by the rows written, which a slow machine does not shift out of the sweep, and
        # then any time on.
        more = draw.randrange(3)
        while (
            more
            and process.poll() is None
            and (not rows.exists() or len(lines(rows)) < count + more)
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03 if more else 0.15))
        process.kill()
        killed += process.wait() == -9
    assert killed > 15  # the others came after the last point
    assert lines(rows)
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 1
    written = [json.loads(line) for line in lines(rows)]
    assert len({row["key"] for row in written}) == len(written) == 60
    assert outcomes("out") == outcomes("alone")
