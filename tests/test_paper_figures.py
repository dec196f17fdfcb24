"""`python -m paper_figures`: whose rows it draws, what it says is missing, what it keeps, what it
refuses.
"""

import json
import os
import subprocess
import sys

import matplotlib
import pytest

from paper_figures.__main__ import main
from paper_figures.command import finding, keeping
from paper_figures.command.finding import STORED, load
from paper_figures.drawing import style
from tests.support import ROOT, kept

ROWS = load(STORED, "scaling")


@pytest.fixture
def drawn(monkeypatch):
    """{path of a figure, without its ending: texts in it}, instead of the files."""
    figures = {}

    def save(figure, stem):
        figures[str(stem)] = [text.get_text() for text in figure.texts]
        style.plt.close(figure)
        return []

    monkeypatch.setattr(style, "save", save)
    return figures


def refused(capsys, *argv):
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("error: ")
    return said.removeprefix("error: ").strip()


def test_any_folder_is_drawn_by_naming_it_and_into_it(tmp_path, drawn, capsys):
    folder = kept.folder(tmp_path / "results" / "scaling-full", "scaling")
    assert main([str(folder)]) == 0
    assert main(["scaling", "--results", str(folder)]) == 0
    assert main(["--results", str(folder), "--out", str(tmp_path / "else")]) == 0
    assert list(drawn) == [str(folder / "scaling"), str(tmp_path / "else" / "scaling")]
    assert capsys.readouterr().err == ""
    # By the folder above it, the default size alone is found: the others are named.
    capsys.readouterr()
    assert main(["scaling", "--results", str(tmp_path / "results")]) == 1
    assert f"those in {folder}: python -m paper_figures {folder}\n" in capsys.readouterr().err
    assert refused(capsys, "rates", "--results", folder) == (
        f"{folder}: got results of scaling, expected those of rates"
    )


def test_kept_figures_are_replaced_by_kept_rows_alone(tmp_path, drawn):
    kept.folder(tmp_path / "scaling", "scaling")
    assert main(["scaling", "--results", str(tmp_path)]) == 0
    assert main(["scaling"]) == 0
    assert list(drawn) == [str(tmp_path / "figures" / "scaling"), str(finding.HERE / "scaling")]


def test_what_is_missing_is_said_and_the_rest_is_drawn(tmp_path, drawn, capsys):
    failed = ROWS[1]["key"]
    folder = kept.folder(tmp_path / "mine", "scaling", rows=ROWS[1:], failed=(failed,))
    assert main([str(folder)]) == 0
    (texts,) = drawn.values()
    assert f"{len(ROWS) - 2} of {len(ROWS)} points" in texts
    said = capsys.readouterr().err.splitlines()
    label = " ".join(f"{name}={value}" for name, value in ROWS[0]["point"].items())
    assert said[:2] == [
        f"scaling: {len(ROWS) - 2} of {len(ROWS)} points drawn",
        f"  missing: {label}",
    ]
    assert (
        said[3] == f"  the rest: python -m experiments configs/scaling.toml --out {folder} --retry"
    )
    nothing = kept.folder(tmp_path / "none", "scaling", rows=ROWS[:1], failed=(ROWS[0]["key"],))
    assert main([str(nothing)]) == 1
    assert "all 1 points failed; measure them again: " in capsys.readouterr().err


def test_rows_of_other_points_are_left_out_and_counted(tmp_path, drawn, capsys):
    planned = {row["key"]: row["point"] for row in ROWS[:-2]}
    folder = kept.folder(tmp_path / "mine", "scaling", planned=planned)
    assert main([str(folder)]) == 0
    assert drawn == {str(folder / "scaling"): []}
    assert "scaling: 2 rows of points that the last run did not ask for" in capsys.readouterr().err


def test_shards_are_drawn_together(tmp_path, drawn, capsys):
    """One of three is there: the others' points are missing."""
    folder = kept.folder(tmp_path / "mine", "scaling", rows=ROWS[::3])
    (folder / "rows.jsonl").rename(folder / "rows-1-of-3.jsonl")
    (folder / "manifest.json").rename(folder / "manifest-1-of-3.json")
    assert main([str(folder)]) == 0
    assert f"{len(ROWS[::3])} of {len(ROWS)} points drawn" in capsys.readouterr().err
    other = kept.folder(tmp_path / "other", "scaling", rows=[*ROWS[1::3], *ROWS[2::3]])
    (other / "rows.jsonl").rename(folder / "rows-2-of-2.jsonl")
    (other / "manifest.json").rename(folder / "manifest-2-of-2.json")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().err == ""


def test_two_plans_in_one_folder_are_never_drawn_together(tmp_path, drawn, capsys):
    folder = kept.folder(tmp_path / "mine", "scaling")
    other = kept.folder(tmp_path / "other", "scaling", fields={"degree": 4})
    # Other fields make other keys.
    foreign = (other / "rows.jsonl").read_text().replace('"key": "', '"key": "other')
    (folder / "rows-1-of-2.jsonl").write_text(foreign)
    assert main([str(folder)]) == 0
    said = f"scaling: {len(ROWS)} rows of points that the last run did not ask for"
    assert said in capsys.readouterr().err
    manifest = (folder / "manifest.json").rename(tmp_path / "manifest.json")
    got = "with degree = 4 beside with degree = 3"
    assert refused(capsys, folder) == (
        f"{folder}: got results of two plans, {got}; expected those of one"
    )
    manifest.rename(folder / "manifest.json")
    (other / "manifest.json").rename(folder / "manifest-1-of-2.json")
    got = "with degree = 4 beside with degree = 3"
    assert refused(capsys, folder) == (
        f"{folder}: got results of two plans, {got}; expected those of one"
    )


def test_rows_without_their_fields_are_drawn_and_marked(drawn, capsys):
    """Those that are kept from older versions."""
    without = [name for name in finding.available() if not name.startswith("diagnose")]
    without = [n for n in without if "fields" not in load(STORED, finding.find(n).CONFIG)[0]]
    if without:
        assert main([without[0], "--out", "nowhere"]) == 0
        assert capsys.readouterr().err.startswith(f"{without[0]}: rows of an older version")
        assert "say their fields" in (finding.HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "rows.jsonl:2: got '{', expected a row of a sweep"),
        ("", "rows.jsonl:2: got '', expected a row of a sweep"),
        ('{"key": "ab", "status": "ok"}', 'rows.jsonl:2: got \'{"key": "ab"'),
        ("\ufeff{}", "rows.jsonl:2: got '\\ufeff{}'"),
        ("[NaN]", "rows.jsonl:2: got '[NaN]'"),
    ],
)
def test_a_line_that_is_no_row_is_refused_in_one_line(tmp_path, capsys, line, said):
    folder = kept.folder(tmp_path / "mine", "scaling")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    text = "\n".join([lines[0], line, *lines[2:]]) + "\n"
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    assert refused(capsys, folder).startswith(f"{folder / said}")
    # Among kept rows too, and the other figures are drawn.
    flat = tmp_path / "scaling.jsonl"
    flat.write_text(text, encoding="utf-8")
    assert refused(capsys, "scaling", "--results", tmp_path).startswith(f"{flat}:2: got ")


def test_a_torn_last_line_and_a_byte_order_mark_are_passed_over(tmp_path, drawn, capsys):
    folder = kept.folder(tmp_path / "mine", "scaling")
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text + '{"key": "12', encoding="utf-8-sig")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_or_written_is_refused_in_one_line(tmp_path, capsys):
    folder = kept.folder(tmp_path / "mine", "scaling")
    (tmp_path / "file").touch()
    assert (
        refused(capsys, folder, "--out", tmp_path / "file") == f"{tmp_path / 'file'}: File exists"
    )
    assert refused(capsys, folder, "--out", "/proc/none").startswith("/proc/none: ")
    (folder / "manifest.json").write_text("[1")
    assert refused(capsys, folder).startswith(f"{folder / 'manifest.json'}: got a file that is not")
    (folder / "manifest.json").unlink()
    (folder / "rows.jsonl").unlink()
    assert refused(capsys, folder).startswith(f"{folder}: got a folder without rows*.jsonl")
    assert refused(capsys, "--results", tmp_path / "none").startswith("--results: got ")
    assert refused(capsys, "--keep", tmp_path / "none").startswith("--keep: got ")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """An empty place for rows to be kept in."""
    monkeypatch.setattr(keeping, "STORED", tmp_path / "data")
    return tmp_path / "data"


def test_rows_are_kept_whatever_is_drawn_after(stored, tmp_path, drawn):
    folder = kept.folder(tmp_path / "mine", "scaling")
    assert main(["--keep", str(folder), "scaling"]) == 0
    assert len(load(stored, "scaling")) == len(ROWS)


def test_rows_are_kept_with_the_account_of_their_run(stored, tmp_path, capsys, drawn):
    folder = kept.folder(tmp_path / "mine", "scaling")
    assert main(["--keep", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{stored / 'scaling.jsonl'}: nothing yet",
        f"{folder}: {len(ROWS)} rows of full size, 01234567, 2026-01-02T03:04:05+00:00",
    ]
    assert [row["key"] for row in load(stored, "scaling")] == [row["key"] for row in ROWS]
    told = json.loads((stored / "scaling.manifest.json").read_text())
    assert told["missing"] == told["runs"] == []
    assert not {"argv", "planned"} & told.keys()
    assert sorted(path.name for path in stored.iterdir()) == [
        "scaling.jsonl",
        "scaling.manifest.json",
    ]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: kept.folder(p, "scaling", size="smoke"), "smoke size in place of full size"),
        (lambda p: kept.folder(p, "scaling", rows=ROWS[2:]), f"2 of {len(ROWS)} points missing"),
        (lambda p: kept.folder(p, "scaling", failed=(ROWS[0]["key"],)), "1 points failed"),
        (lambda p: kept.folder(p, "scaling", dirty=True), "rows from a tree with changes"),
        (lambda p: kept.folder(p, "scaling", dirty=None), "rows from a tree with changes"),
    ],
)
def test_what_would_lose_something_is_not_kept_unasked(stored, tmp_path, capsys, drawn, make, said):
    assert main(["--keep", str(kept.folder(tmp_path / "full", "scaling"))]) == 0
    before = {path: path.read_bytes() for path in stored.iterdir()}
    folder = make(tmp_path / "mine")
    assert said in refused(capsys, "--keep", folder)
    assert {path: path.read_bytes() for path in stored.iterdir()} == before
    assert main(["--keep", str(folder), "--force"]) == 0
    assert {path: path.read_bytes() for path in stored.iterdir()} != before


def test_a_folder_that_cannot_be_kept_leaves_what_is_kept_alone(stored, tmp_path, capsys, drawn):
    assert main(["--keep", str(kept.folder(tmp_path / "full", "scaling"))]) == 0
    before = {path: path.read_bytes() for path in stored.iterdir()}
    folder = kept.folder(tmp_path / "mine", "scaling")
    # The second file of two cannot be written.
    blocked = stored / "scaling.manifest.json.partial"
    blocked.mkdir()
    assert refused(capsys, "--keep", folder).endswith(
        "scaling.manifest.json.partial: Is a directory"
    )
    blocked.rmdir()
    assert {path: path.read_bytes() for path in stored.iterdir()} == before
    (folder / "rows.jsonl").write_text("")
    assert "without rows" in refused(capsys, "--keep", folder, "--force")
    (folder / "rows.jsonl").write_text("{}\n{}\n")
    assert "expected a row of a sweep" in refused(capsys, "--keep", folder, "--force")
    (folder / "rows.jsonl").unlink()
    assert "without rows" in refused(capsys, "--keep", folder, "--force")
    assert {path: path.read_bytes() for path in stored.iterdir()} == before


def test_runs_that_were_merged_are_told_and_one_from_a_changed_tree_is_enough(
    stored, tmp_path, capsys, drawn
):
    """Also where it is not the last one; a run that measured nothing says nothing."""
    idle = {"run": "idle", "started": "2026-01-03", "commit": None, "dirty": True}
    first = {"run": "first", "started": "2026-01-01", "commit": "aa", "dirty": False}
    folder = kept.folder(tmp_path / "mine", "scaling", runs=[first, idle])
    rows = (folder / "rows.jsonl").read_text().splitlines()
    rows[0] = rows[0].replace('"run": "one"', '"run": "first"')
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["--keep", str(folder)]) == 0
    told = json.loads((stored / "scaling.manifest.json").read_text())
    assert [(run["run"], run["commit"], run["rows"]) for run in told["runs"]] == [
        ("first", "aa", 1),
        ("one", "0123456789abcdef", len(ROWS) - 1),
    ]
    other = kept.folder(tmp_path / "other", "scaling", runs=[first | {"dirty": True}])
    (other / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert "tree with changes" in refused(capsys, "--keep", other)


def test_the_users_matplotlibrc_changes_no_byte(tmp_path):
    """In a process of its own, for matplotlib reads the file when it is imported."""
    rc = tmp_path / "matplotlibrc"
    rc.write_text("axes.grid: True\ntext.usetex: True\nfigure.dpi: 31\nsavefig.bbox: tight\n")
    env = {**os.environ, "MATPLOTLIBRC": str(rc)}
    command = [sys.executable, "-m", "paper_figures", "scaling", "--out", str(tmp_path / "own")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(["scaling", "--out", str(tmp_path / "plain")]) == 0
    for ending in ("pdf", "png"):
        own, plain = (tmp_path / name / f"scaling.{ending}" for name in ("own", "plain"))
        assert own.read_bytes() == plain.read_bytes()


def test_the_diagnosis_figure_starts_from_the_defaults_too(drawn):
    with matplotlib.rc_context({"text.usetex": True, "axes.grid": True}):
        assert main(["diagnose"]) == 0
        assert not matplotlib.rcParams["text.usetex"]
