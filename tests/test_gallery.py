"""paper_figures/README.md against the rows: written again it is the same, and other rows change it."""

import copy
import math

import pytest

from paper_figures.command.finding import STORED, available, load
from paper_figures.command.main import main as figures
from paper_figures.gallery import claims, limits, notes, page, results, saying, speed
from paper_figures.gallery.__main__ import main
from tests.support import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def found():
    """All claims, recomputed from the kept rows: once, for it takes seconds."""
    return claims.recomputed()


@pytest.fixture(scope="module")
def text(found):
    return page.text(found["paper_figures/README.md"])


def test_the_pages_claim_what_the_rows_say(found, monkeypatch):
    """Write them again: make gallery."""
    monkeypatch.setattr(claims, "recomputed", lambda: found)
    assert claims.parted() == []
    assert claims.count() > 60


def test_a_claim_and_its_rows_that_part_are_told(monkeypatch, capsys):
    """In the claim, in both pages, and by the command."""
    kept = results.kept

    def violated(config):
        rows = kept(config)  # read anew
        if config == "certificates":
            rows[0]["metrics"]["violations"] = 3
        if config == "real_heads":
            rows[0]["metrics"]["gamma_ratio"] = 77.0
        return rows

    monkeypatch.setattr(results, "kept", violated)
    assert figures(["--check-claims"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert any("certified bounds below the true error: got '0 of" in line for line in told)
    assert [line for line in told if line.startswith("README.md: 24 real heads")]
    assert told[-2:] == [
        "README.md: not what the rows say; write it: make gallery",
        "paper_figures/README.md: not what the rows say; write it: make gallery",
    ]


def test_the_command_ends_with_0_where_all_is_well(monkeypatch, capsys):
    """What it recomputes is tried above."""
    monkeypatch.setattr(claims, "parted", list)
    assert figures(["--check-claims"]) == 0
    assert capsys.readouterr().out.endswith("all as they are printed\n")


def test_every_figure_and_every_config_is_there(text):
    for name in available():
        assert text.count(f"]({name}.png)") == 1
        assert (ROOT / "paper_figures" / f"{name}.png").is_file()
        assert (ROOT / "paper_figures" / f"{name}.pdf").is_file()
    for name in CONFIGS:
        assert f"\n| `{name}` | {notes.note(name).minutes['smoke']:g} |" in text
    assert {config for config, _ in results.LINES} == {*CONFIGS, "diagnose", "diagnose_decoder"}


def test_links_lead_to_files(text):
    for link in text.split("](")[1:]:
        assert (ROOT / "paper_figures" / link.split(")")[0]).is_file(), link[:60]


def test_tables_have_as_many_cells_everywhere(found):
    lines = results.table(found["paper_figures/README.md"]).splitlines()
    assert len(lines) > 40
    assert {line.count("|") for line in lines} == {4}
    assert not any("nan" in line or "inf" in line for line in lines)


def test_a_number_follows_its_row():
    rows = load(STORED, "scaling")
    what, told = speed.adapters(rows)[0]
    assert "L = 16384" in what
    slower = copy.deepcopy(rows)
    for row in slower:
        for method in row["metrics"]["methods"].values():
            if method.get("operations", 0) > 1e9:
                method["rounds"] = [2 * seconds for seconds in method["rounds"]]
    assert speed.adapters(slower)[0][1] != told
    violated = copy.deepcopy(load(STORED, "certificates"))
    violated[0]["metrics"]["violations"] = 3
    assert limits.certificates(violated)[-1][1].startswith("3 of ")


def test_missing_rows_are_named_not_left_out(monkeypatch, capsys):
    monkeypatch.setattr(results, "load", lambda results, config: None)
    assert main([]) == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1)
    assert "rows of scaling: got none" in said


def test_rows_that_cannot_be_read_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "scaling.jsonl").write_text("{}\n{}\n")
    monkeypatch.setattr(results, "STORED", tmp_path)
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path / 'scaling.jsonl'}:1: got '{{}}', expected a row of a sweep\n"


def test_minutes_come_from_the_configs(capsys):
    assert main(["--minutes", "scaling", "real_heads"]) == 0
    scaling, heads = (notes.note(name).minutes["default"] for name in ("scaling", "real_heads"))
    printed = capsys.readouterr().out
    assert printed.startswith(f"about {scaling + heads:g} minutes")
    assert f"scaling {scaling:g}, real_heads {heads:g}" in printed
    assert main(["--minutes", "scalling"]) == 2
    assert "got 'scalling', expected one of accelerator, " in capsys.readouterr().err


def test_what_was_given_beside_the_config_is_told():
    told = notes.manifest("factors")
    told["config"]["most"] = 7
    assert "most = 7" in notes.otherwise(told)
    told["config"] |= notes.note("factors").fields["full"]
    assert notes.otherwise(told) == ""


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0"), (0.1146, "0.11"), (56.4, "56"), (12904, "13,000"), (2.5e-5, "2.5e-5"), (1, "1.0")],
)
def test_numbers_have_two_digits(value, told):
    assert saying.plain(value) == told


@pytest.mark.parametrize(
    ("mean", "half", "told"),
    [
        (0.913, 0.052, "0.91 ± 0.05"),
        (56.2, 16.1, "56 ± 16"),
        (0.0063, 0.0098, "0.006 ± 0.010"),
        (-0.04, 0.5, "0.0 ± 0.5"),
    ],
)
def test_a_spread_has_the_digits_that_mean_something(mean, half, told):
    assert saying.spread(mean, half) == told


def test_what_seeds_agree_on_is_said_once_and_what_is_not_a_number_is_said():
    metrics = {
        "by_seed": {"error": [2e-5, 1e-5, 4e-5], "bound": [0.31, 0.312], "lost": [1, math.nan]}
    }
    assert saying.over_seeds(metrics, "error") == "1.0e-5 to 4.0e-5"
    assert saying.over_seeds(metrics, "bound") == "0.31"
    assert "nan" in saying.over_seeds(metrics, "lost")


def test_a_ratio_of_times_carries_both_spreads():
    slow = {"seconds": 10.0, "spread": 2.0, "repeats": 7}
    fast = {"seconds": 1.0, "spread": 0.4, "repeats": 7}
    half = 10 * (0.2 + 0.4) / 2
    assert saying.times(slow, fast) == f"10 ± {half:.0f} times"
    assert saying.times(slow | {"repeats": 1}, fast) == "10 times (one timed round)"
    assert math.isclose(half, 3.0)
    slow["rounds"], fast["rounds"] = [20.0, 20.0, 40.0, 44.0, 40.0], [2.0, 2.0, 4.0, 4.0, 4.0]
    assert saying.times(slow, fast) == "10.00 ± 0.00 times"


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([{}, {}], "3 seeds a point"),
        ([{"seeds": 3}, {"seeds": 1}], "1 to 3 seeds a point"),
        ([{"seed": 0}, {"seed": 1}], "2 seeds"),
    ],
)
def test_points_that_ask_for_fewer_seeds_are_told(points, said):
    assert notes.seeds({"config": {"seeds": 3}}, [{"point": point} for point in points]) == said
