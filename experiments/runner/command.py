"""What `python -m experiments` does with its command line.

Flags are read by hand, for any field may follow a double dash with one value or several: argparse
would take -1e-4 for a flag, let the last of two --seed win, and print a usage for one line that
says what was got and expected. The experiment's module, and jax with it, is imported only once the
runner's own flags and the lab note are found to be sound.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from experiments import Refused
from experiments.runner import config, note, sweep, telling

USAGE = """\
usage: python -m experiments configs/NAME.toml ... [--size smoke|default|full] [--smoke] [--out DIR]
                             [--shard I/N] [--retry] [--FIELD value ...]

Measure every point of a config that has no row yet; a run that was stopped goes on where it was.

  --size SIZE    which of the config's sizes (default: default); --smoke is short for --size smoke
  --out DIR      the results folder (default: results/NAME, or results/NAME-SIZE for another size)
  --shard I/N    every N-th point from the I-th on, into files of its own; 1/N ... N/N together make the whole
  --retry        measure the points that failed again
  --FIELD value  another value for a field of the experiment; several values make a list
  --list         the configs there are, and how long each takes
  --help         this; after a config, its claim and its fields

exit status: 0, or 1 if any point failed, 2 if a run was refused, 130 if it was interrupted"""


class Flags(NamedTuple):
    """The command line, read: the configs, the runner's own flags, and fields with their words."""

    paths: list[str]
    size: str
    out: Path | None
    shard: tuple[int, int] | None
    retry: bool
    fields: dict[str, list[str]]


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` (without the program's name) and return its exit status; one line
    for any refusal.
    """
    try:
        leading, flags = group(argv)
        helped = "help" in flags or "-h" in leading
        if "list" in flags:
            telling.configs()
        elif helped and not [word for word in leading if word != "-h"]:
            print(USAGE)
        elif helped:
            _explain(read([word for word in leading if word != "-h"], flags))
        else:
            return _run(read(leading, flags), argv)
        return 0
    except Refused as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(_told(error), file=sys.stderr)
    except KeyboardInterrupt:
        print(
            "interrupted: the same command goes on with the points that are left", file=sys.stderr
        )
        return 130
    return 2


def _told(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def group(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words that belong to no flag, and each flag's name (with underscores) with the words that
    follow it.

    Raises Refused for a flag that comes twice and for one of the runner's own without its word.
    """
    leading: list[str] = []
    flags: dict[str, list[str]] = {}
    name, room = "", 0.0
    for word in argv:
        # Only a double dash opens a flag: -1e-4 is a value.
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in flags:
                raise Refused(f"--{name}: got it twice, expected it once")
            flags[name] = [value] if equals else []
            room = config.FLAGS.get(name, math.inf) - len(flags[name])
        elif room > 0:
            flags[name].append(word)
            room -= 1
        else:
            leading.append(word)
    for name, words in flags.items():
        wanted = config.FLAGS.get(name, len(words))
        if len(words) != wanted:
            got = "a value" if words else "no value"
            raise Refused(f"--{name}: got {got}, expected {'one' if wanted else 'none'}")
    return leading, flags


def read(leading: list[str], flags: dict[str, list[str]]) -> Flags:
    """What `group` found, checked as far as that goes without an experiment's module.

    Raises Refused for no config, and for a runner's flag whose value does not fit.
    """
    if not leading:
        usage = "python -m experiments configs/NAME.toml ... (--help says more, --list shows them)"
        raise Refused(f"got no config file, expected at least one: {usage}")
    size = flags["size"][0] if "size" in flags else "smoke" if "smoke" in flags else "default"
    if "smoke" in flags and size != "smoke":
        raise Refused(f"--size: got {size!r} beside --smoke, expected one of the two")
    if size not in config.SIZES:
        raise Refused(f"--size: got {size!r}, expected one of {', '.join(config.SIZES)}")
    out = flags["out"][0] if "out" in flags else None
    if out == "":
        raise Refused("--out: got '', expected the name of a folder")
    if out is not None and len(leading) > 1:
        raise Refused(f"--out: got one folder for {len(leading)} configs, expected one config")
    return Flags(
        leading,
        size,
        Path(out) if out else None,
        read_shard(flags["shard"][0]) if "shard" in flags else None,
        "retry" in flags,
        {name: words for name, words in flags.items() if name not in config.FLAGS},
    )


def _explain(flags: Flags) -> None:
    for path in flags.paths:
        telling.header(Path(path).stem, note.read(path), flags.size)
        telling.fields(override(note.load(path, flags.size), flags.fields))


def _run(flags: Flags, argv: Sequence[str]) -> int:
    """All configs are read before any is measured; one that is refused then stops no other."""
    notes = {path: note.read(path) for path in flags.paths}
    several = len(notes) > 1
    if several:
        telling.say(f"{len(notes)} configs: {', '.join(Path(path).stem for path in notes)}")
    else:
        # At once: what comes next imports jax, and takes a moment.
        telling.header(Path(flags.paths[0]).stem, notes[flags.paths[0]], flags.size)
    planned = {path: override(note.load(path, flags.size), flags.fields) for path in notes}
    statuses = []
    for path, one in planned.items():
        if several:
            telling.say("")
            telling.header(one.name, one.note, flags.size)
        own = [path, *(word for word in argv if word not in notes)]
        try:
            statuses.append(_run_one(one, flags, own))
        except (Refused, OSError) as error:
            if not several:
                raise
            print(_told(error) if isinstance(error, OSError) else error, file=sys.stderr)
            statuses.append(2)
    if several:
        words = {0: "whole", 1: "points failed", 2: "refused"}
        each = zip(planned.values(), statuses, strict=True)
        telling.say("\n" + ", ".join(f"{one.name}: {words[status]}" for one, status in each))
    return max(statuses)


def _run_one(one: note.Sweep, flags: Flags, argv: Sequence[str]) -> int:
    name = one.name if flags.size == "default" else f"{one.name}-{flags.size}"
    folder = flags.out or Path("results", name)
    failed = sweep.run(one, folder, argv, shard=flags.shard, retry=flags.retry)
    telling.failures(one.name, failed, argv)
    return 1 if failed else 0


def override(loaded: note.Sweep, flags: Mapping[str, Sequence[str]]) -> note.Sweep:
    """The sweep with the fields named by flags changed, its config checked anew. Raises Refused as
    `note.load`.
    """
    fields = loaded.experiment.fields
    return note.override(loaded, {n: read_words(fields, n, words) for n, words in flags.items()})


def read_words(fields: type[config.Fields], name: str, words: Sequence[str]) -> Any:
    """The value that the words after --NAME stand for, unchecked: JSON where they are JSON and no
    text is wanted. A list is several words, or one word in brackets.

    Raises Refused for an unknown field and for no words at all.
    """
    if name not in fields.model_fields:
        known = ", ".join(f"--{known}" for known in [*fields.model_fields, *config.FLAGS])
        raise Refused(f"--{name}: got an unknown flag, expected one of {known}")
    annotation = fields.model_fields[name].annotation
    if not words:
        raise Refused(f"--{name}: got no value, expected {config.describe(annotation)}")
    kinds = list(_parts(annotation))
    lists = kinds.count(list) + kinds.count(tuple)
    whole = _json_or_text(words[0]) if lists and len(words) == 1 else None
    if isinstance(whole, list) and _depth(whole) == lists:
        return whole
    values = [word if str in kinds else _json_or_text(word) for word in words]
    return values if len(values) > 1 or lists else values[0]


def _depth(value: Any) -> int:
    """How deep lists lie in lists; of an empty one, 1."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _parts(annotation: Any) -> Iterator[Any]:
    """Every type inside an annotation: tuple[int, ...] | None holds tuple, int and NoneType."""
    yield get_origin(annotation) or annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def _json_or_text(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def read_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N", 1 <= I <= N. Raises Refused for anything else."""
    first, _, count = text.partition("/")
    # Digits of other scripts are decimal too.
    if text.isascii() and first.isdecimal() and count.isdecimal():
        shard = int(first), int(count)
        if 1 <= shard[0] <= shard[1]:
            return shard
    raise Refused(f"--shard: got {text!r}, expected I/N with 1 <= I <= N")
