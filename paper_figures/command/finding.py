"""Which figures there are, and where the rows of each lie: results folders, or the rows kept here."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import paper_figures
from experiments import Refused
from experiments.runner import results, store
from experiments.runner.results import Results

HERE = Path(paper_figures.__file__).parent
STORED = HERE / "data"


def available() -> list[str]:
    """Names of the figures there are: one module each, whatever is not a package of helpers."""
    modules = pkgutil.iter_modules(paper_figures.__path__)
    return sorted(m.name for m in modules if not m.ispkg and m.name != "__main__")


def find(name: str) -> ModuleType | None:
    """The module of a figure: one of `available`, or the module NAME when it has a dot; None where
    there is none with CONFIG and draw.
    """
    if "." not in name:
        return importlib.import_module(f"paper_figures.{name}") if name in available() else None
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # What the module itself fails to import is not for this function to hide.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return None
    return module if hasattr(module, "CONFIG") and hasattr(module, "draw") else None


def is_results(folder: Path) -> bool:
    """Whether a sweep wrote into this folder itself, and not into folders in it."""
    return any(folder.glob("rows*.jsonl")) or any(folder.glob("manifest*.json"))


def names_in(folder: Path) -> set[str]:
    """The names that a results folder goes by: of its config, of its experiment's module."""
    told = [*store.read_manifests(folder), *(store.read(folder)[:1])]
    named = [str(one[name]) for one in told for name in ("name", "experiment") if name in one]
    return {name.rpartition(".")[2] for name in named}


def find_results(where: Path, config: str) -> Results | None:
    """The results of a config: `where` itself, or where/CONFIG, or the rows kept in
    where/CONFIG.jsonl or, one row, in where/CONFIG.json. None where there are none.

    Raises Refused for results that cannot be read, and where `where` is of another config.
    """
    if is_results(where):
        if config not in names_in(where):
            got = " or ".join(sorted(names_in(where)))
            raise Refused(f"{where}: got results of {got}, expected those of {config}")
        return results.load(where)
    if (where / f"{config}.jsonl").is_file():
        return results.load(where / f"{config}.jsonl")
    if (where / f"{config}.json").is_file():
        return _one_row(where / f"{config}.json")
    folder = where / config
    return results.load(folder) if folder.is_dir() and is_results(folder) else None


def _one_row(path: Path) -> Results:
    try:
        row = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise Refused(f"{path}: got a file that is not a JSON object, expected a diagnosis")
    return Results(path, [row], [], [], 0, None)


def load(where: Path, config: str) -> list[dict[str, Any]] | None:
    """The rows of a config that finished, as `find_results`; None where there are none."""
    found = find_results(where, config)
    return (found.rows or None) if found else None


def other_folders(where: Path, config: str) -> list[Path]:
    """Results folders of the config in `where` under other names, as of other sizes."""
    found = []
    for folder in sorted(path for path in where.iterdir() if path.is_dir()):
        if folder.name != config and is_results(folder):
            try:
                found += [folder] if config in names_in(folder) else []
            except Refused:
                continue  # it is not drawn, so what ails it is not said
    return found
