"""The wheel: lora_limits alone, with its command and without what only experiments need."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

import lora_limits
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def run(*command, cwd, **more):
    """What a command prints; fails with all that it said."""
    # Neither the checkout nor the flags of these tests: a user has none of them.
    ours = {"PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"}
    clean = {name: value for name, value in os.environ.items() if name not in ours} | more
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=clean
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that pyproject.toml names, from a copy: a build leaves folders
    behind.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # All that lies beside the package, so that a rule which takes too much would show.
    for name in ("lora_limits", "experiments", "paper_figures", "tests", "notebooks"):
        skip = shutil.ignore_patterns("__pycache__", "*.png", "*.pdf", "*.jsonl")
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    run(sys.executable, "-c", BUILD, out, cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "lora_limits",
        f"lora_limits-{lora_limits.__version__}.dist-info",
    }
    inside = {name for name in names if name.startswith("lora_limits/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_limits").rglob("*.py")}
    assert inside == modules | {"lora_limits/py.typed", "lora_limits/checklist.md"}


def imported(folder):
    """The packages that modules in a folder import, wherever in the module."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names


def test_the_wheel_asks_for_what_the_library_imports(metadata):
    """Every import of lora_limits is a dependency or of an extra; none of the experiments' own."""
    required = metadata.get_all("Requires-Dist")
    core = {re.split(r"[<>=; \[]", line)[0] for line in required if "extra ==" not in line}
    assert core == {line.split(">=")[0] for line in PROJECT["dependencies"]}
    assert not core & {"pydantic", "scikit-learn", "orbax-checkpoint", "torch", "tyro", "pytest"}
    # of extras, imported where they are used
    extras = {"torch", "transformers", "peft", "tokenizers", "orbax"}
    found = imported(ROOT / "lora_limits") - set(sys.stdlib_module_names) - {"lora_limits"} - extras
    assert {"jax", "flax", "numpy", "scipy"} <= found
    assert found <= core


def test_the_wheel_says_what_pyproject_says(wheel, metadata):
    assert metadata["Version"] == lora_limits.__version__
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2406.03136"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "lora-limits = lora_limits.cli:program" in archive.read(name).decode()


def test_version_and_date_are_told_alike():
    told, heading = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md")
    )
    date = re.search(r'date-released: "(.*)"', told)[1]
    assert f"version: {lora_limits.__version__}\n" in told
    assert f"## [{lora_limits.__version__}] - {date}\n" in heading


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """The README's quickstart and the command, in a folder without the checkout. Installs from a
    package index.
    """
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    pinned = ("-c", ROOT / "constraints.txt")
    run(scripts / "python", "-m", "pip", "install", "--quiet", *pinned, wheel, cwd=tmp_path)
    absent = (
        "import importlib.util as u; print([u.find_spec(n) for n in ('experiments', 'pydantic')])"
    )
    assert run(scripts / "python", "-c", absent, cwd=tmp_path).strip() == "[None, None]"

    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "quickstart.py").write_text(code, encoding="utf-8")
    run(scripts / "python", "-W", "error", "quickstart.py", cwd=tmp_path)

    version = run(scripts / "lora-limits", "--version", cwd=tmp_path)
    assert version == f"lora-limits {lora_limits.__version__}\n"
    printed = run(scripts / "lora-limits", "theorems", "Lemma 3.2", cwd=tmp_path, COLUMNS="80")
    assert "holds as corrected" in printed
    assert printed.splitlines()[-1].endswith("0 checks failed.")
