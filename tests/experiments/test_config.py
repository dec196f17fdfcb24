"""What the runner is told: flags, sizes and config files, and one line for whatever is refused."""

import json
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.runner import store
from experiments.runner.note import load
from experiments.runner.note import read as load_note
from tests.support import ROOT
from tests.support.tools import refusal


@pytest.mark.parametrize(
    ("flags", "folder", "lengths"),
    [
        (["--smoke"], "results/toy-smoke", [1]),
        (["--size", "smoke"], "results/toy-smoke", [1]),
        (["--size", "full"], "results/toy-full", [1, 2, 3, 4, 5, 6, 7]),
        (["--size=smoke", "--out=there"], "there", [1]),
    ],
)
def test_each_size_has_its_fields_and_folder(toy, flags, folder, lengths):
    assert main([*flags, "toy.toml"]) == 0
    assert [row["metrics"]["count"] for row in store.read(folder)] == lengths


def test_flags_change_fields(toy):
    flags = "--lengths 8 9 --gamma -1e-1 --seed 3 --offset null --title 12 --failing 4"
    flags += " --series chebyshev --pause 0"
    assert main(["toy.toml", *flags.split()]) == 0
    config = json.loads(Path("results/toy/manifest.json").read_text())["config"]
    assert config == {
        "lengths": [8, 9],
        "gamma": -0.1,
        "series": "chebyshev",
        "seed": 3,
        "offset": None,
        "title": "12",
        "failing": [4],
        "pause": 0.0,
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lengths abc", "--lengths: got 'abc', expected a list of integers"),
        ("--lengths 8 0", "--lengths: got 0, expected greater than 0"),
        ("--lengths 8.0", "--lengths: got 8.0, expected a list of integers"),
        ("--lengths", "--lengths: got no value, expected a list of integers"),
        ("--lengths 2000", "command line: got lengths up to 2000, expected at most 1000"),
        ("--gamma nan", "--gamma: got 'nan', expected a number"),
        ("--gamma NaN", "--gamma: got nan, expected a finite number"),
        ("--gamma -Infinity", "--gamma: got -inf, expected a finite number"),
        ("--gamma 1 2", "--gamma: got [1, 2], expected a number"),
        ("--gamma true", "--gamma: got True, expected a number"),
        ("--seed 1.5", "--seed: got 1.5, expected an integer"),
        ("--offset x", "--offset: got 'x', expected a number or null"),
        ("--series sine", "--series: got 'sine', expected 'taylor' or 'chebyshev'"),
        ("--pause -1", "--pause: got -1, expected greater than or equal to 0"),
        ("--seed 1 --seed 2", "--seed: got it twice, expected it once"),
        ("--size huge", "--size: got 'huge', expected one of smoke, default, full"),
        ("--size full --smoke", "--size: got 'full' beside --smoke, expected one of the two"),
        ("--size", "--size: got no value, expected one"),
        ("--smoke=yes", "--smoke: got a value, expected none"),
        ("--shard 3/2", "--shard: got '3/2', expected I/N with 1 <= I <= N"),
        ("--shard 0/2", "--shard: got '0/2', expected I/N with 1 <= I <= N"),
        ("--shard half", "--shard: got 'half', expected I/N with 1 <= I <= N"),
        ("--smoke 512", "512: No such file or directory, expected a config file (--list"),
        ("--shard \u0663/\u0664", "--shard: got '\u0663/\u0664', expected I/N with 1 <= I <= N"),
        ("--lengths \u0663", "--lengths: got '\u0663', expected a list of integers"),
        ("--lengths [1,[2]]", "--lengths: got [1, [2]], expected a list of integers"),
        ("--out=", "--out: got '', expected the name of a folder"),
        ("toy.toml other.toml --out x", "--out: got one folder for 3 configs, expected one"),
        ("--out toy.toml", "toy.toml: File exists"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(toy, capsys, flags, said):
    assert refusal(capsys, "toy.toml", *flags.split()).startswith(said)
    assert not Path("results").exists()


def test_an_unknown_flag_is_refused_with_the_known_ones(toy, capsys):
    said = refusal(capsys, "toy.toml", "--length", "3")
    assert said.startswith(
        "--length: got an unknown flag, expected one of --lengths, --gamma, --series"
    )
    assert "--shard" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "lengths = [1, 2, 3, 4, 5, 6, 7]",
            "lengths = 'abc'",
            "default.lengths: got 'abc', expected a list of integers",
        ),
        (
            "lengths = [1]",
            "lengths = [1, 'x']",
            "smoke.lengths: got 'x', expected a list of integers",
        ),
        ("lengths = [1]", "lengths = []", "smoke.lengths: got [], expected at least 1 item"),
        (
            "lengths = [1]",
            "lengths = [1001]",
            "smoke: got lengths up to 1001, expected at most 1000",
        ),
        (
            "lengths = [1, 2, 3, 4, 5, 6, 7]\n",
            "",
            "default.lengths: got nothing, expected a list of integers",
        ),
        ("gamma = 2", "gamma = nan", "full.gamma: got nan, expected a finite number"),
        ("gamma = 2", "gamma = -inf", "full.gamma: got -inf, expected a finite number"),
        ("gamma = 2", "gamma = '2'", "full.gamma: got '2', expected a number"),
        ("gamma = 2", "gamma = 1979-05-27", "full.gamma: got '1979-05-27', expected a number"),
        ("gamma = 2", "gama = 2", "full.gama: got an unknown key, expected one of lengths, gamma,"),
        ("claim = ", "clam = ", "clam: got an unknown key, expected one of experiment, claim,"),
        ("[default]", "[smoke.x]", "got no fields, expected [default] and under it a line a"),
        ("", "[defualt]", "defualt: got an unknown key, expected one of experiment, claim,"),
        ("default = 1,", "default = 'x',", "minutes.default: got 'x', expected a number"),
        ("default = 1,", "", "minutes.default: got nothing, expected a number"),
        ("minutes = {", "minutes = 3 #", "minutes: got 3, expected a table"),
        ("[default]", "[default", "got text that is not TOML"),
        (
            "tests.support.toy_experiment",
            "no_such_thing",
            "experiment: got 'no_such_thing', expected a module",
        ),
        (
            "tests.support.toy_experiment",
            "../toy",
            "experiment: got '../toy', expected the name of a module",
        ),
        ("tests.support.toy_experiment", "runner", "experiment: got 'runner', which has no Config"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(toy, capsys, old, new, said):
    assert refusal(capsys, toy(old, new)).startswith(f"toy.toml: {said}")
    assert not Path("results").exists()


def test_a_config_that_cannot_be_read_is_refused(toy, capsys):
    assert (
        refusal(capsys, "none.toml")
        == "none.toml: No such file or directory, expected a config file "
        "(--list shows those there are)"
    )
    Path("binary.toml").write_bytes(b"\xff\xfe")
    assert refusal(capsys, "binary.toml").startswith("binary.toml: got text that is not TOML")
    assert refusal(capsys).startswith("got no config file, expected at least one")


def test_several_configs_are_run_one_after_the_other(toy, capsys):
    """One that fails or is refused stops no other, and the last line says how each ended."""
    note = Path("toy.toml").read_text()
    for name in ("first", "second", "third"):
        Path(f"{name}.toml").write_text(note)
    assert main(["second.toml", "--seed", "9"]) == 0
    capsys.readouterr()
    assert main(["first.toml", "second.toml", "third.toml", "--failing", "3"]) == 2
    printed, said = capsys.readouterr()
    assert printed.splitlines()[0] == "3 configs: first, second, third"
    last = "first: points failed, second: refused, third: points failed"
    assert printed.splitlines()[-1] == last
    assert "measure them again: python -m experiments third.toml --failing 3 --retry\n" in printed
    assert said.startswith(
        "results/second: got results with seed = 9, expected with seed = 0; try:"
    )
    assert said.endswith("second.toml --failing 3 --out results/second-seed-0\n")
    # What is wrong with one is found before any is measured.
    Path("second.toml").write_text(note.replace("gamma = 2", "gama = 2"))
    assert main(["third.toml", "second.toml", "--smoke"]) == 2
    assert not Path("results/third-smoke").exists()


def test_the_note_comes_first_and_fields_are_told(toy, capsys):
    toy('claim = "none"', 'claim = "A root grows as a root."')
    main(["toy.toml", "--smoke"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "toy, smoke size: about 0.1 min on two idle cores",
        "claim: A root grows as a root.",
        "expect: nothing",
    ]
    assert main(["toy.toml", "--size", "full", "--help"]) == 0
    told = capsys.readouterr().out
    assert "claim: A root grows" in told
    assert "  --gamma  a number (only makes points)\n      2.0\n" in told
    assert "  --pause  a number (where files lie)\n" in told
    assert "  --offset  a number or null\n      None\n" in told


def test_every_config_is_listed_with_its_minutes_and_claim(capsys):
    assert main(["--list"]) == 0
    told = capsys.readouterr().out
    for path in (ROOT / "configs").glob("*.toml"):
        minutes = load_note(path).minutes
        each = f"{minutes.smoke:g}, {minutes.default:g}, {minutes.full:g}"
        assert f"\nconfigs/{path.name:<20}{each}\n" in told


def test_load_gives_the_experiment_and_its_config(toy):
    sweep = load("toy.toml", "full")
    assert sweep.config.model_dump()["gamma"] == 2.0
    assert sweep.experiment.points(sweep.config)[0] == {"length": 1, "gamma": 2.0}
    assert sweep.note.minutes.full == 2
