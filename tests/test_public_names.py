"""What `import lora_limits` offers, when it imports what, and the old names of modules that moved."""

import ast
import importlib
import subprocess
import sys

import pytest

import lora_limits
from lora_limits import _moved
from tests.support import ROOT


def annotated():
    """{name: module} of the imports that type checkers read."""
    tree = ast.parse((ROOT / "lora_limits" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("name", lora_limits.__all__)
def test_every_public_name_is_there_and_listed(name):
    assert getattr(lora_limits, name) is not None
    assert name in vars(lora_limits) or name == "hardness"  # found once
    assert name in dir(lora_limits)


def test_type_checkers_and_python_find_the_same_names_in_the_same_modules():
    told = annotated()
    assert told.pop("hardness") == "lora_limits"  # a package, found by its name
    assert told == lora_limits._HOME
    assert sorted([*told, "hardness"]) == sorted(lora_limits.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'gradients_of'"):
        lora_limits.gradients_of  # noqa: B018
    assert not hasattr(lora_limits, "__wrapped__")


def test_no_module_has_the_name_of_a_public_function():
    """Else importing it would put the module where the function was."""
    for name in set(lora_limits.__all__) - {"hardness"}:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"lora_limits.{name}")


def test_importing_the_package_imports_no_jax():
    code = (
        "import sys, lora_limits\n"
        "assert 'jax' not in sys.modules\n"
        "lora_limits.Polynomial(3)\n"
        "assert 'jax' in sys.modules\n"
        "assert 'lora_limits.hardness' not in sys.modules\n"
        "from lora_limits import *\n"
        "assert gradient is lora_limits.gradient and callable(random_problem)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def forgotten(monkeypatch):
    """Lets an old name be imported as if for the first time, and be forgotten afterwards."""

    def forget(old):
        name = f"lora_limits.{old}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(lora_limits, old, raising=False)
        return name

    yield forget
    for old in _moved.MOVED:
        sys.modules.pop(f"lora_limits.{old}", None)
        vars(lora_limits).pop(old, None)


@pytest.mark.parametrize(("old", "new"), _moved.MOVED.items())
def test_an_old_module_name_works_and_says_the_new_one(old, new, forgotten):
    name = forgotten(old)
    with pytest.warns(DeprecationWarning, match=f"{name} is now lora_limits.{new}; "):
        module = importlib.import_module(name)
    present = importlib.import_module(f"lora_limits.{new}")
    public = [n for n in vars(present) if not n.startswith("__")]
    assert public
    assert all(getattr(module, n) is getattr(present, n) for n in public)
    with pytest.raises(AttributeError):
        module.nothing_of_the_kind  # noqa: B018


def test_from_an_old_module_import_a_name(forgotten):
    forgotten("sample")
    with pytest.warns(DeprecationWarning, match="is now lora_limits.synthetic"):
        from lora_limits.sample import random_problem
    assert random_problem is lora_limits.random_problem


def test_the_changelog_names_every_module_that_moved():
    told = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    table = [line for line in told.splitlines() if line.startswith("| `")]
    for old, new in _moved.MOVED.items():
        (line,) = (line for line in table if f"`{old}` *" in line.split(" | ")[0])
        assert f"`{new}`" in line
