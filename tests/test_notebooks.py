"""The notebooks with their outputs, against the percent scripts that they are written from."""

import ast
import json
import tempfile
from pathlib import Path

import pytest

from notebooks.execute.__main__ import main, merged, sources
from tests.support import ROOT
from tests.support.tools import extra

NAMES = [source.stem for source in sources()]
MOST = 300 * 1024  # bytes: they are kept in the repository


def read(name):
    """The cells of the .ipynb, as JSON holds them."""
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def text(field):
    """JSON may hold a text as a list of its lines."""
    return field if isinstance(field, str) else "".join(field)


def shows(code):
    """Whether a cell shows anything: it prints, draws, or ends in an expression."""
    tree = ast.parse(code)
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return bool(calls & {"print", "plt.show"}) or isinstance(tree.body[-1], ast.Expr)


def test_there_are_notebooks():
    assert len(NAMES) >= 4
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_its_source(name):
    """Make them again: make notebooks."""
    source = extra("jupytext").read(ROOT / "notebooks" / f"{name}.py")
    want = [(cell.cell_type, cell.source) for cell in source.cells]
    assert [(cell["cell_type"], text(cell["source"])) for cell in read(name)] == want


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_that_shows_something_has_its_output(name):
    cells = [cell for cell in read(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert shows(text(cell["source"])) == bool(cell["outputs"]), text(cell["source"])
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}  # no error
    assert "display_data" in kinds


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_small_and_say_nothing_of_a_machine(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < MOST
    for cell in read(name):
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", text(output["text"])
            told = text(output.get("text", "")) + text(output.get("data", {}).get("text/plain", ""))
            for folder in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages"):
                assert folder not in told


def test_what_a_cell_prints_is_one_output():
    a, b = ({"output_type": "stream", "name": "stdout", "text": text} for text in ("one ", "two"))
    picture = {"output_type": "display_data", "data": {}}
    assert merged([a, b, picture]) == [a | {"text": "one two"}, picture]


def test_a_notebook_that_is_not_there_is_refused_in_one_line(capsys):
    assert main(["notebooks/05.py"]) == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1)
    assert "got notebooks/05.py, expected one of 01_gradient_and_its_rank.py" in said
