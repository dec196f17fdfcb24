"""The command line of `python -m paper_figures`: which figures, from which rows, drawn where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import Refused
from experiments.runner import telling
from experiments.runner.results import Results
from lora_limits.arguments import Parser
from paper_figures.command import finding, keeping
from paper_figures.command.finding import HERE, STORED, available

ABOUT = """\
Draw figures from stored results. NAME: a figure, a results folder (its own figure is drawn into it), or,
with a dot, a module of one's own."""


class Task(NamedTuple):
    """A figure to draw: its module, where its rows lie, where it goes."""

    name: str
    module: Any
    where: Path
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 when results are missing for a figure that was named, 2 for bad arguments
    and for results that cannot be read, each after one line.
    """
    args = _read(argv)
    if args.check_claims:
        return check_claims()
    try:
        if args.keep is not None:
            kept = keeping.keep(args.keep, force=args.force)
            args.names = args.names or [kept]
        tasks = _tasks(args)
    except (Refused, OSError) as error:
        return _refuse(error)
    status = 0
    for task in tasks:
        try:
            drawn = draw(task)
        except (Refused, OSError) as error:
            status = _refuse(error)
            continue
        if not drawn and args.names:
            status = max(status, 1)
    return status


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. The parser itself ends it with status 2 for a flag there is not."""
    parser = Parser(prog="python -m paper_figures", description=ABOUT)
    names = f"what to draw, all by default: {', '.join(available())}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    results = "where the results lie: a folder of results folders, or one of them (default: those kept here)"
    parser.add_argument("--results", type=Path, default=STORED, metavar="DIR", help=results)
    out = "where to write PDF and PNG (default: for kept rows here, else in the results' folder)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    kept = "first keep the results in DIR here, in data/"
    parser.add_argument("--keep", type=Path, metavar="DIR", help=kept)
    force = "keep also what is incomplete, smaller than what is there, or from a tree with changes"
    claims = (
        "draw nothing, but recompute every number of README.md and the gallery from the kept rows"
    )
    parser.add_argument("--check-claims", action="store_true", help=claims)
    parser.add_argument("--force", action="store_true", help=force)
    return parser.parse_args(argv)


def check_claims() -> int:
    """Exit status: 0; 1 when a claim and the rows have parted, after a line for each."""
    from paper_figures.gallery import claims

    try:
        told = claims.parted()
    except (Refused, ValueError, OSError) as error:
        return _refuse(error)
    for line in told:
        print(line, file=sys.stderr)
    if not told:
        print(f"{claims.count()} claims recomputed from the kept rows: all as they are printed")
    return 1 if told else 0


def _refuse(error: Exception) -> int:
    told = str(error)
    if isinstance(error, OSError) and error.filename:
        told = f"{error.filename}: {error.strerror}"
    print(f"error: {told}", file=sys.stderr)
    return 2


def _tasks(args: argparse.Namespace) -> list[Task]:
    """What the command line asks for. Raises Refused for names and folders that are not there."""
    if not args.results.is_dir():
        raise Refused(f"--results: got {args.results}, expected a folder of results")
    known = available()
    if not args.names and finding.is_results(args.results):
        args.names = [str(args.results)]
    tasks = []
    unknown = []
    for name in args.names or known:
        folder = Path(name)
        if name not in known and folder.is_dir():
            if not finding.is_results(folder):
                raise Refused(f"{folder}: got a folder without rows*.jsonl, expected results")
            own = sorted(finding.names_in(folder) & {*known})
            if not own:
                raise Refused(f"{folder}: got results that no figure draws, expected {known}")
            module = finding.find(own[0])
            tasks.append(Task(own[0], module, folder, args.out or folder))
            continue
        module = finding.find(name)
        if module is None:
            unknown.append(name)
        tasks.append(Task(name, module, args.results, args.out or _beside(args.results)))
    if unknown:
        raise Refused(f"figures: got {unknown}, expected results folders or names among {known}")
    return tasks


def _beside(results: Path) -> Path:
    """Where figures go unless said: never among the kept ones but from the kept rows."""
    if results.resolve() == STORED.resolve():
        return HERE
    return results if finding.is_results(results) else results / "figures"


def draw(task: Task) -> bool:
    """Draws one figure and says what of it is missing; False where there is nothing to draw.

    Raises Refused for results that cannot be read, OSError for a place that cannot be written to.
    """
    module = task.module
    found = finding.find_results(task.where, module.CONFIG)
    if found is None or not found.rows:
        print(_nothing(task, found), file=sys.stderr)
        return False
    # Here, for --help does not wait for matplotlib.
    from paper_figures.drawing import style

    beside = task.where.parent if finding.is_results(task.where) else task.where
    also = {
        config: finding.load(beside, config) or [] if beside.is_dir() else []
        for config in getattr(module, "ALSO", ())
    }
    figure = module.draw(found.rows, also) if also else module.draw(found.rows)
    style.say_where_empty(figure)
    if found.missing or found.failed:
        style.note(figure, f"{len(found.rows)} of {found.planned} points")
    _tell(task.name, found)
    stem = task.out / task.name.rpartition(".")[2]
    for path in style.save(figure, stem):
        print(path)
    if hasattr(module, "table"):
        table = stem.with_suffix(".md")
        table.write_text(module.table(found.rows), encoding="utf-8")
        print(table)
    return True


def _tell(name: str, found: Results) -> None:
    """What of the results is not in the figure, and the command that would add it."""
    told = found.manifest or {}
    if found.missing or found.failed:
        print(f"{name}: {len(found.rows)} of {found.planned} points drawn", file=sys.stderr)
        for label, points in (
            ("missing", found.missing),
            ("failed", [row["point"] for row in found.failed]),
        ):
            shown = [telling.label(point) for point in points[:5]]
            more = [f"and {len(points) - 5} more"] if len(points) > 5 else []
            if shown:
                print(f"  {label}: {'; '.join([*shown, *more])}", file=sys.stderr)
        if told.get("argv"):
            rest = telling.the_rest(told["argv"], found.path, retry=bool(found.failed))
            print(f"  the rest: {rest}", file=sys.stderr)
    if found.others:
        print(
            f"{name}: {found.others} rows of points that the last run did not ask for are left out",
            file=sys.stderr,
        )
    if told and not found.fields_known:
        print(f"{name}: rows of an older version, which do not say their fields", file=sys.stderr)


def _nothing(task: Task, found: Results | None) -> str:
    """What is missing, and the command that makes it."""
    config = task.module.CONFIG
    if found is not None and found.failed:
        argv = (found.manifest or {}).get("argv", [f"configs/{config}.toml"])
        again = telling.the_rest(argv, found.path, retry=True)
        point = f"{found.path}: all {len(found.failed)} points failed"
        return f"{task.name}: {point}; measure them again: {again}"
    others = finding.other_folders(task.where, config) if task.where != STORED else []
    if others:
        draw_it = f"python -m paper_figures {others[0]}"
        return f"{task.name}: no results in {task.where / config}; those in {others[0]}: {draw_it}"
    where = "" if task.where == STORED else f" --out {task.where / config}"
    command = f"python -m experiments configs/{config}.toml{where}"
    make = getattr(task.module, "COMMAND", command)
    return f"{task.name}: no results of {config} in {task.where}; make them with: {make}"
