"""What several test files share: optional extras, quick compilation, refused commands, and walks
over pairs of gradients.
"""

import importlib
import os

import numpy as np
import pytest

from experiments.__main__ import main
from lora_limits.instruments.comparing import named as arrays
from lora_limits.instruments.compiling import QUICK, quick_jit

HEAD = ["claim:", "expect:"]  # of a config, after its name and minutes

__all__ = ["QUICK", "arrays", "quick_jit"]


def later(*values):
    """Parameters (one each, or a tuple) left to the slow tests: each compiles a program of its own,
    to show the same.
    """
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values
    ]


def all_extras():
    """Whether what is missing fails a test instead of skipping it."""
    return os.environ.get("LORA_LIMITS_ALL_EXTRAS") == "1"


def extra(name):
    """The module `name` of an optional extra: skips without it, or fails under
    LORA_LIMITS_ALL_EXTRAS=1.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if all_extras():
            pytest.fail(f"LORA_LIMITS_ALL_EXTRAS=1, but {name} is missing: {error}")
        pytest.skip(f"needs {name}")


def refusal(capsys, *argv):
    """The one line that a refused command says; nothing is printed but the head of its config."""
    assert main(argv) == 2
    printed, said = capsys.readouterr()
    assert printed == "" or [line.split()[0] for line in printed.splitlines()][1:] == HEAD
    assert said.count("\n") == 1
    return said.strip()


def assert_close(got, want, tolerance, scale=None):
    """Every array within `tolerance` of the largest entry anywhere (or of `scale`), in max norm;
    same names.
    """
    got, want = arrays(got), arrays(want)
    assert got.keys() == want.keys()
    scale = max(np.abs(x).max() for x in want.values()) if scale is None else scale
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        error = np.abs(got[name] - x).max()
        assert error <= tolerance * scale, f"{name}: {error:.3e} against {tolerance * scale:.3e}"
