"""Every experiment at smoke size, through its own command, and the figures drawn from what it
leaves.
"""

import contextlib
import importlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from paper_figures.__main__ import main as draw
from paper_figures.drawing import style
from tests.support import ROOT
from tests.support.tools import later

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.toml"))
NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("*.py"))


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A folder with the smoke results of every config, made on demand."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def children():
    """Processes as a user's are, with no strictness, that run one command after the other: {64 bits
    or not: pool}.
    """
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as narrow,
        ProcessPoolExecutor(1, get_context("spawn")) as wide,
    ):
        yield {False: narrow, True: wide}


@pytest.fixture
def drawn(monkeypatch):
    """The names of the figures that were drawn, each in full but for its files."""
    names = []

    def save(figure, stem):
        figure.draw_without_rendering()
        style.plt.close(figure)
        names.append(stem.name)
        return []

    monkeypatch.setattr(style, "save", save)
    return names


def smoke(name, out):
    """The status and what is printed by `python -m experiments configs/NAME.toml --smoke --out
    OUT`.
    """
    from experiments.__main__ import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        return main(
            [str(ROOT / "configs" / f"{name}.toml"), "--smoke", "--out", out]
        ), printed.getvalue()


def script(code):
    """What a script prints, run from top to bottom; its figures go nowhere. Raises what it
    raises.
    """
    os.environ["MPLBACKEND"] = "Agg"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


def run_script(code, children):
    """`script` in the child of its precision."""
    return children["jax_enable_x64" in code].submit(script, code).result(timeout=600)


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_size_runs_and_its_figure_is_drawn(name, children, results, drawn, tmp_path):
    wide = getattr(importlib.import_module(f"experiments.{name}"), "X64", False)
    status, printed = (
        children[bool(wide)].submit(smoke, name, str(results / name)).result(timeout=600)
    )
    assert status == 0, printed
    assert printed.splitlines()[-1].startswith(f"results: {results / name}")
    if not (ROOT / "paper_figures" / f"{name}.py").exists():
        pytest.fail(f"no figure for {name}")
    assert draw([name, "--results", str(results), "--out", str(tmp_path)]) == 0
    assert drawn == [name]


def test_a_missing_result_names_the_command_that_makes_it(tmp_path, capsys):
    assert draw(["scaling", "--results", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "python -m experiments configs/scaling.toml" in capsys.readouterr().err
    assert draw(["nothing"]) == 2


# A pilot trains several models, and has tests of its own.
LONG = ("04_fine_tune",)


@pytest.mark.parametrize("name", [*(name for name in NOTEBOOKS if name not in LONG), *later(*LONG)])
def test_notebook_runs(name, children):
    """To its last line, which the sentence below marks: an exception on the way is the child's, and
    raised here.
    """
    code = (ROOT / "notebooks" / f"{name}.py").read_text()
    printed = run_script(code + "\nprint('to the end')\n", children).splitlines()
    assert len(printed) > 1
    assert printed[-1] == "to the end"


def test_the_readme_code_runs(children):
    """The Python block of the README, at a shorter length."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        code = block.split("```")[0]
        assert "length=16384" in code
        run_script(code.replace("length=16384", "length=4096"), children)


def test_a_figure_is_drawn_alike_twice(tmp_path, children):
    """Here and in another process."""
    assert draw(["scaling", "--out", str(tmp_path / "here")]) == 0
    assert (
        children[False]
        .submit(draw, ["scaling", "--out", str(tmp_path / "there")])
        .result(timeout=600)
        == 0
    )
    assert len(list((tmp_path / "there").iterdir())) == 2
    for path in (tmp_path / "there").iterdir():
        assert path.read_bytes() == (tmp_path / "here" / path.name).read_bytes()


@pytest.mark.slow
def test_the_kept_results_draw_every_kept_figure(drawn, tmp_path):
    names = sorted(p.stem for p in (ROOT / "paper_figures").glob("*.png"))
    assert "phase_boundary" in names
    assert draw([*names, "--out", str(tmp_path)]) == 0
    assert drawn == names
