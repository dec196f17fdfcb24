"""Modules that moved in 0.2: the old name works for this one version, with a warning that names the
new one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

MOVED = {
    "bert": "nn.bert",
    "chain": "gradients.chain",
    "exact": "gradients.exact",
    "layers": "nn.lora",
    "monomials": "polynomial.monomials",
    "per_layer": "nn.per_layer",
    "sample": "synthetic",
    "sharded": "gradients.sharded",
    "theorems": "ledger.command",
    "transformer": "nn.transformer",
    "widths": "polynomial.needed",
}


class _Forwarding(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old module name and fills it with everything that the new module holds."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        if package == "lora_limits" and name in MOVED:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = "lora_limits." + MOVED[module.__name__.rpartition(".")[2]]
        warnings.warn(
            f"{module.__name__} is now {new}; the old name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        present = importlib.import_module(new)
        module.__doc__ = present.__doc__
        # asked of the new module at every access, so that private names and later changes are seen
        # too
        module.__dict__["__getattr__"] = lambda name: getattr(present, name)


def install() -> None:
    """Lets `import lora_limits.layers` and its like find where the module went; after all other
    finders.
    """
    if not any(isinstance(finder, _Forwarding) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarding())
