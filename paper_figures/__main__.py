"""python -m paper_figures [NAME ...] [--results DIR] [--out DIR]: draw figures from stored
results. A NAME with a dot is a module of one's own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import paper_figures
from experiments.runner import store

HERE = Path(__file__).parent
STORED = HERE / "data"


def available() -> list[str]:
    """Names of the figures there are: one module each, whatever is not a package of helpers."""
    modules = pkgutil.iter_modules(paper_figures.__path__)
    return sorted(m.name for m in modules if not m.ispkg and m.name != "__main__")


def known(name: str) -> bool:
    """Whether there is such a figure: one of `available`, or the module NAME when it has a dot."""
    if "." not in name:
        return name in available()
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of a package that it would lie in
        return False


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


def draw(name: str, results: Path, out: Path) -> str | None:
    """Draws one figure; returns what is missing, or None."""
    module = importlib.import_module(name if "." in name else f"paper_figures.{name}")
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


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 when results are missing for a figure that was named, 2 for bad
    arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"figures to draw: {', '.join(available())}"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=STORED,
        help="where the results lie (default: those kept here)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="where to write PDF and PNG (default: beside this file)",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="first keep the results in DIR here, in data/"
    )
    args = parser.parse_args(argv)
    if args.keep is not None:
        if not list(args.keep.glob("manifest*.json")):
            print(
                f"error: --keep: got {args.keep}, expected a folder that a sweep wrote",
                file=sys.stderr,
            )
            return 2
        keep(args.keep)
    unknown = sorted({name for name in args.names if not known(name)})
    if unknown:
        print(f"error: figures: got {unknown}, expected names among {available()}", file=sys.stderr)
        return 2
    if not args.results.is_dir():
        print(
            f"error: --results: got {args.results}, expected a folder of results", file=sys.stderr
        )
        return 2
    told = [draw(name, args.results, args.out) for name in args.names or available()]
    missing = [line for line in told if line is not None]
    for line in missing:
        print(line, file=sys.stderr if args.names else sys.stdout)
    return 1 if missing and args.names else 0


if __name__ == "__main__":
    sys.exit(main())
