"""What `python -m experiments` does with its command line.

Flags are read by hand, for any field may follow a double dash with one value or several: argparse
would take -1e-4 for a flag, let the last of two --seed win, and print a usage for one line that
says what was got and expected. The experiment's module, and jax with it, is imported only once the
runner's own flags and the lab note are found to be sound.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from experiments import Refused
from experiments.runner import config, sweep

USAGE = """\
usage: python -m experiments configs/NAME.toml [--size smoke|default|full] [--smoke] [--out DIR] [--shard I/N]
                             [--retry] [--FIELD value ...]

Measure every point of a config that has no row yet; a run that was stopped goes on where it was.

  --size SIZE    which of the config's sizes (default: default); --smoke is short for --size smoke
  --out DIR      the results folder (default: results/NAME, or results/NAME-SIZE for another size)
  --shard I/N    every N-th point from the I-th on, into files of its own; 1/N ... N/N together make the whole
  --retry        measure the points that failed again
  --FIELD value  another value for a field of the experiment; several values make a list (an unknown flag
                 lists the fields)

exit status: 0, or 1 if any point failed, 2 if the run was refused, 130 if it was interrupted"""


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` (without the program's name) and return its exit status; one line
    for any refusal.
    """
    try:
        leading, flags = group(argv)
        if "help" in flags or "-h" in leading:
            print(USAGE)
            return 0
        return _run(leading, flags, argv)
    except Refused as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
    except KeyboardInterrupt:
        print(
            "interrupted: the same command goes on with the points that are left", file=sys.stderr
        )
        return 130
    return 2


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


def _run(leading: list[str], flags: dict[str, list[str]], argv: Sequence[str]) -> int:
    if len(leading) != 1:
        got = " ".join(leading) or "no config file"
        usage = "python -m experiments configs/NAME.toml ... (--help says more)"
        raise Refused(f"got {got}, expected one: {usage}")
    size = flags["size"][0] if "size" in flags else "smoke" if "smoke" in flags else "default"
    if "smoke" in flags and size != "smoke":
        raise Refused(f"--size: got {size!r} beside --smoke, expected one of the two")
    shard = read_shard(flags["shard"][0]) if "shard" in flags else None
    overrides = {name: words for name, words in flags.items() if name not in config.FLAGS}
    planned = override(config.load(leading[0], size), overrides)
    name = planned.path.stem if size == "default" else f"{planned.path.stem}-{size}"
    folder = Path(flags["out"][0]) if "out" in flags else Path("results", name)
    return sweep.run(planned, folder, argv, shard=shard, retry="retry" in flags)


def override(loaded: config.Sweep, flags: Mapping[str, Sequence[str]]) -> config.Sweep:
    """The sweep with the fields named by flags changed, its config checked anew. Raises Refused as
    `config.load`.
    """
    fields = loaded.experiment.fields
    values = {name: read_words(fields, name, words) for name, words in flags.items()}
    # A new instance, for model_copy(update=...) would take any value.
    changed = config.check(fields, {"": loaded.config.model_dump(mode="json"), "--": values})
    return dataclasses.replace(loaded, config=changed)


def read_words(fields: type[config.Fields], name: str, words: Sequence[str]) -> Any:
    """The value that the words after --NAME stand for, unchecked: JSON where they are JSON and no
    text is wanted.

    Raises Refused for an unknown field and for no words at all.
    """
    if name not in fields.model_fields:
        known = ", ".join(f"--{known}" for known in [*fields.model_fields, *config.FLAGS])
        raise Refused(f"--{name}: got an unknown flag, expected one of {known}")
    annotation = fields.model_fields[name].annotation
    if not words:
        raise Refused(f"--{name}: got no value, expected {config.describe(annotation)}")
    kinds = list(_parts(annotation))
    values = [word if str in kinds else _json_or_text(word) for word in words]
    return values if len(values) > 1 or list in kinds or tuple in kinds else values[0]


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
    if first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count):
        return int(first), int(count)
    raise Refused(f"--shard: got {text!r}, expected I/N with 1 <= I <= N")
