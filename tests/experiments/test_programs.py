"""The runner as a program: what it imports before it must, its exit status and its precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runner import store
from tests.support import ROOT
from tests.support.toy_experiment import NOTE


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
    assert python("-c", "import jax; jax.numpy.ones(1)", env=nowhere).returncode == 1


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
