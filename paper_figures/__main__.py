"""python -m paper_figures [NAME ...] [--results DIR] [--out DIR]: draw figures from stored
results. A NAME with a dot is a module of one's own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import paper_figures
from experiments.runner import store

HERE = Path(__file__).parent
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


def load(results: Path, config: str) -> list[dict[str, Any]] | None:
    """Rows of a config that finished: from results/CONFIG/rows*.jsonl, or from the kept
    results/CONFIG.jsonl.

    One row where results/CONFIG.json is all there is.
    """
    kept = results / f"{config}.jsonl"
    if kept.is_file():
        rows = [store.decode(json.loads(line)) for line in kept.read_text().splitlines()]
    elif kept.with_suffix(".json").is_file():
        return [json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))]
    elif (results / config).is_dir():
        rows = store.read(results / config)
    else:
        return None
    return [row for row in rows if row["status"] == "ok"] or None


def draw(name: str, module: Any, results: Path, out: Path) -> str | None:
    """Draws one figure; returns what is missing, or None."""
    rows = load(results, module.CONFIG)
    if rows is None:
        where = "" if results == STORED else f" --out {results / module.CONFIG}"
        command = f"python -m experiments configs/{module.CONFIG}.toml{where}"
        make = getattr(module, "COMMAND", command)
        return f"{name}: no results of {module.CONFIG} in {results}; make them with: {make}"
    # Here, for --help does not wait for matplotlib.
    from paper_figures.drawing import style

    also = {config: load(results, config) or [] for config in getattr(module, "ALSO", ())}
    figure = module.draw(rows, also) if also else module.draw(rows)
    stem = out / name.rpartition(".")[2]
    for path in style.save(figure, stem):
        print(path)
    if hasattr(module, "table"):
        table = stem.with_suffix(".md")
        table.write_text(module.table(rows))
        print(table)
    return None


def keep(folder: Path) -> None:
    """Copies the results in a folder to those kept here: CONFIG.jsonl, and of the manifest all but
    paths and argv.
    """
    manifest = json.loads(next(iter(sorted(folder.glob("manifest*.json")))).read_text())
    name = manifest["experiment"]
    STORED.mkdir(exist_ok=True)
    # One row a key, failures replaced: what the figures read, and no more.
    lines = [json.dumps(store.encode(row), allow_nan=False) + "\n" for row in store.read(folder)]
    (STORED / f"{name}.jsonl").write_text("".join(lines))
    # Paths, and runs that went before, are of the machine and not of the result.
    told = {k: v for k, v in manifest.items() if k not in ("argv", "runs")}
    (STORED / f"{name}.manifest.json").write_text(json.dumps(told, indent=1) + "\n")
    print(STORED / f"{name}.jsonl")


def _read(argv: list[str] | None) -> argparse.Namespace:
    """The command line. argparse itself ends it with status 2 for a flag there is not."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=__doc__)
    names = f"figures to draw: {', '.join(available())}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    results = "where the results lie (default: those kept here)"
    parser.add_argument("--results", type=Path, default=STORED, help=results)
    out = "where to write PDF and PNG (default: beside this file)"
    parser.add_argument("--out", type=Path, default=HERE, help=out)
    kept = "first keep the results in DIR here, in data/"
    parser.add_argument("--keep", type=Path, metavar="DIR", help=kept)
    return parser.parse_args(argv)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 when results are missing for a figure that was named, 2 for bad
    arguments.
    """
    args = _read(argv)
    if args.keep is not None:
        if not list(args.keep.glob("manifest*.json")):
            return _refuse(f"--keep: got {args.keep}, expected a folder that a sweep wrote")
        keep(args.keep)
    modules = {name: find(name) for name in args.names or available()}
    unknown = sorted(name for name, module in modules.items() if module is None)
    if unknown:
        return _refuse(f"figures: got {unknown}, expected names among {available()}")
    if not args.results.is_dir():
        return _refuse(f"--results: got {args.results}, expected a folder of results")
    told = [draw(name, module, args.results, args.out) for name, module in modules.items()]
    missing = [line for line in told if line is not None]
    for line in missing:
        print(line, file=sys.stderr if args.names else sys.stdout)
    return 1 if missing and args.names else 0


if __name__ == "__main__":
    sys.exit(main())
