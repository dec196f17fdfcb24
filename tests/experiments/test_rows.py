"""The rows that a sweep leaves: which plan they belong to, and lines that are torn or bad."""

import json
import shlex
from pathlib import Path

import pytest

from experiments import Refused
from experiments.__main__ import main
from experiments.runner import store
from tests.support import toy_experiment
from tests.support.tools import refusal
from tests.support.written import lines, outcomes


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


def test_metrics_that_are_not_json_make_a_failed_row(toy, monkeypatch):
    monkeypatch.setattr(
        toy_experiment,
        "measure",
        lambda point, config: {"value": {1, 2}} if point["length"] == 1 else 3,
    )
    assert main(["toy.toml", "--lengths", "1", "2", "--out", "out"]) == 1
    assert [row["error"]["type"] for row in store.read("out")] == ["TypeError", "TypeError"]


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
