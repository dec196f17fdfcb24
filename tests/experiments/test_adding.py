"""Adding an experiment is three files: its module, its TOML and its figure. No list names it."""

import importlib
import sys
import textwrap

import pytest

import experiments
import paper_figures
from experiments.__main__ import main as run
from experiments.runner import experiment as example
from experiments.runner import store
from paper_figures.__main__ import main as draw
from paper_figures.command.finding import available

MODULE = """
import numpy as np
from pydantic import PositiveInt

from experiments.runner.config import Fields

X64 = None
POINTS = ("lengths",)


class Config(Fields):
    lengths: tuple[PositiveInt, ...]
    factor: float = 2.0


def points(config):
    return [{"length": length} for length in config.lengths]


def measure(point, config):
    return {"grown": float(np.sqrt(point["length"]) * config.factor)}
"""
NOTE = """
experiment = "NAME"
claim = "A root grows as a root."
command = "python -m experiments configs/roots.toml"
minutes = { smoke = 0.01, default = 0.01, full = 0.01 }
expect = "A straight line of slope 1/2."

[default]
lengths = [1, 4, 16]

[smoke]
lengths = [1, 4]
"""
FIGURE = """
from paper_figures.drawing import style

CONFIG = "roots"


def draw(rows):
    fig, axes = style.figure(2.0)
    lengths = [row["point"]["length"] for row in rows]
    axes[0, 0].loglog(lengths, [row["metrics"]["grown"] for row in rows], "o-")
    return fig
"""


@pytest.fixture
def fresh():
    """Forgets the modules that a test brings along."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "roots" in name or name.startswith("mine"):
            del sys.modules[name]
    importlib.invalidate_caches()


def test_an_experiment_beside_the_others_is_its_module_its_toml_and_its_figure(
    tmp_path, monkeypatch, fresh
):
    """The two packages are searched in one more folder, as if its files lay in their own."""
    for package, text in ((experiments, MODULE), (paper_figures, FIGURE)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "roots.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roots.toml").write_text(NOTE.replace("NAME", "roots"))
    assert run(["roots.toml"]) == 0
    assert [row["metrics"]["grown"] for row in store.read("results/roots")] == [2.0, 4.0, 8.0]
    assert "roots" in available()
    assert draw(["roots", "--results", "results", "--out", "drawn"]) == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"roots.pdf", "roots.png"}


def test_the_example_is_run_changed_and_drawn(tmp_path, monkeypatch, capsys, fresh):
    """As its docstring has it, and no more: its module, the two lines of its TOML; and a figure."""
    module, note = example.__doc__.partition("roots.py:\n")[2].split("\nand in configs/roots.toml")
    module, note = textwrap.dedent(module), textwrap.dedent(note.partition(":\n")[2])
    for package, text in ((experiments, module), (paper_figures, FIGURE.replace("grown", "root"))):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "roots.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roots.toml").write_text(note)
    assert run(["roots.toml"]) == 0
    # Another field goes elsewhere, by the command that the refusal says.
    assert run(["roots.toml", "--factor", "3"]) == 2
    command = capsys.readouterr().err.partition("python -m experiments ")[2]
    assert run(command.split()) == 0
    # A longer list keeps the rows there are.
    assert run(["roots.toml", "--lengths", "1", "4", "16", "64"]) == 0
    assert "3 of 4 points are there already" in capsys.readouterr().out
    other = "results/roots-factor-3.0"
    assert [row["metrics"]["root"] for row in store.read(other)] == [3.0, 6.0, 12.0]
    assert draw(["results/roots"]) == draw([other]) == 0
    assert (tmp_path / other / "roots.png").is_file()
    found = store.read("results/roots")
    assert [row["metrics"]["root"] for row in found] == [2.0, 4.0, 8.0, 16.0]


def test_an_experiment_in_a_package_of_ones_own_is_found_by_its_dotted_name(
    tmp_path, monkeypatch, capsys, fresh
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "roots.py").write_text(MODULE)
    (tmp_path / "mine" / "picture.py").write_text(FIGURE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roots.toml").write_text(NOTE.replace("NAME", "mine.roots"))
    assert run(["roots.toml", "--smoke", "--factor", "3", "--out", "results/roots"]) == 0
    assert [row["metrics"]["grown"] for row in store.read("results/roots")] == [3.0, 6.0]
    assert draw(["mine.picture", "--results", "results", "--out", "drawn"]) == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"picture.pdf", "picture.png"}
    for name in ("mine.nothing", "nothing.at.all", "...", "mine.roots"):
        capsys.readouterr()
        assert draw([name, "--results", "results"]) == 2
        assert f"['{name}'], expected results folders or names among" in capsys.readouterr().err
