"""From a config file, a lab note in TOML, to an experiment's typed and checked fields."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from experiments import Refused

Model = TypeVar("Model", bound=BaseModel)
SIZES = ("smoke", "default", "full")
# The runner's own flags and how many words each takes; no field may have one of these names.
FLAGS = {"help": 0, "smoke": 0, "retry": 0, "size": 1, "out": 1, "shard": 1}
WORDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    dict: ("a table", "tables"),
    type(None): ("null", "nulls"),
}


class Fields(BaseModel):
    """Base of every experiment's Config: no unknown keys, no NaN or inf, no conversions ("3" is not
    3), no changes.

    Write fields that hold lists as tuple[int, ...], and rules between fields as validators that
    raise ValueError.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, strict=True)


class Minutes(Fields):
    """About how long each size takes."""

    smoke: PositiveFloat
    default: PositiveFloat
    full: PositiveFloat


class Note(Fields):
    """A config file: what is tested, how to run it, how long it takes, what to expect, and each
    size's fields.
    """

    experiment: str
    claim: str
    command: str
    minutes: Minutes
    expect: str
    default: dict[str, Any]
    smoke: dict[str, Any] = Field(default_factory=dict)
    full: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """An experiment's module, as the runner sees it. The module holds

    Config    a class of `Fields`;
    VERSION   an integer, bumped by hand whenever `measure` would give other numbers for the same point;
    points    config -> list of dicts of JSON values: the coordinates of every point, in a fixed order;
    measure   (point, config) -> dict of JSON values: the metrics of one point; floats may be NaN or infinite;
    SHARED    (optional) names of the fields that `measure` reads from the config; they are part of each row's key.
              A field that only makes points is left out, so that a longer list keeps the rows already there;
    X64       (optional) the value of jax_enable_x64 for the run, False unless given; None for an experiment
              without jax.

    The module imports what it needs at its top: the runner reads the command line and the lab note
    before it imports the module, so --help does not wait for jax. It makes no array there, for X64
    is set between its import and its first point.
    """

    name: str
    fields: type[Fields]
    version: int
    points: Callable[[Any], list[dict[str, Any]]]
    measure: Callable[[dict[str, Any], Any], dict[str, Any]]
    shared: tuple[str, ...] = ()
    x64: bool | None = False


@dataclass(frozen=True)
class Sweep:
    """A config file at one size, checked: `config` is an instance of the experiment's Config."""

    path: Path
    size: str
    note: Note
    experiment: Experiment
    config: Fields


def load(path: str | Path, size: str = "default") -> Sweep:
    """Read a config file and check all three sizes of it.

    Raises Refused for a file that cannot be read, an unknown key, a value of another type or out of
    range.
    """
    path = Path(path)
    if size not in SIZES:
        raise Refused(f"--size: got {size!r}, expected one of {', '.join(SIZES)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}, expected a config file") from None
    except ValueError as error:
        raise Refused(
            f"{path}: got text that is not TOML ({error}), expected a config file"
        ) from None
    note = check(Note, {f"{path}: ": table})
    experiment = find_experiment(note.experiment, where=f"{path}: experiment")
    layers = {
        name: {f"{path}: default.": note.default, f"{path}: {name}.": getattr(note, name)}
        for name in SIZES
    }
    configs = {name: check(experiment.fields, layers[name]) for name in SIZES}
    return Sweep(path, size, note, experiment, configs[size])


def find_experiment(name: str, where: str) -> Experiment:
    """The experiment of experiments/NAME.py, or of the module NAME when it has a dot.

    Raises Refused, its message opening with `where`, for a name that is no such module.
    """
    target = name if "." in name else f"experiments.{name}"
    if not all(part.isidentifier() for part in target.split(".")):
        raise Refused(f"{where}: got {name!r}, expected the name of a module")
    try:
        module = importlib.import_module(target)
    except ImportError as error:
        raise Refused(
            f"{where}: got {name!r}, expected a module that can be imported ({error})"
        ) from None
    lacking = [
        part for part in ("Config", "VERSION", "points", "measure") if not hasattr(module, part)
    ]
    if lacking:
        raise Refused(
            f"{where}: got {name!r}, which has no {lacking[0]}; expected an experiment's module"
        )
    taken = sorted(FLAGS.keys() & module.Config.model_fields.keys())
    if taken:
        clash = f"whose field {taken[0]} is a flag of the runner"
        raise Refused(f"{where}: got {name!r}, {clash}; expected another name")
    return Experiment(
        name,
        fields=module.Config,
        version=module.VERSION,
        points=module.points,
        measure=module.measure,
        shared=tuple(getattr(module, "SHARED", ())),
        x64=getattr(module, "X64", False),
    )


def check(model: type[Model], layers: Mapping[str, Mapping[str, Any]]) -> Model:
    """An instance of `model` from tables laid over one another, each under the prefix that names it
    in messages.

    Raises Refused, naming the last table that holds the offending key.
    """
    merged = {key: value for table in layers.values() for key, value in table.items()}
    try:
        # JSON, not Python objects: strict, yet a list may stand for a tuple. str is for TOML's
        # dates and times.
        return model.model_validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        raise Refused(_one_line(model, layers, error.errors(include_url=False)[0])) from None


def describe(annotation: Any, number: int = 0) -> str:
    """What a type holds, in words: "a list of integers"; in the plural where `number` is 1."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if annotation in WORDS or origin in WORDS:
        return WORDS[origin or annotation][number]
    if origin is Annotated:
        return describe(arguments[0], number)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return ("a list of ", "lists of ")[number] + describe(arguments[0], 1)
    if arguments:
        return " or ".join(describe(argument, number) for argument in arguments)
    return WORDS[dict][number] if _is_model(annotation) else str(annotation)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _one_line(
    model: type[BaseModel], layers: Mapping[str, Mapping[str, Any]], error: Mapping[str, Any]
) -> str:
    """pydantic's account of one error as `where.key: got ..., expected ...`."""
    keys: list[str] = []
    known: list[str] = []
    annotation: Any = model
    for part in error["loc"]:
        # Past the fields, a location goes on with list indices and the members of unions: the
        # field's name is enough.
        if not _is_model(annotation):
            break
        keys.append(part)
        known = list(annotation.model_fields)
        annotation = annotation.model_fields[part].annotation if part in known else None
    kind = error["type"]
    message = error["msg"].removeprefix("Value error, ")
    got = repr(error["input"])
    if not keys:  # a rule between fields, broken by the last table laid over the others
        return f"{list(layers)[-1].rstrip('.-') or 'command line'}: {message}"
    where = [prefix for prefix, table in layers.items() if keys[0] in table] or list(layers)[:1]
    key = where[-1] + ".".join(keys)
    got = got if len(got) <= 60 else got[:57] + "..."
    if kind == "extra_forbidden":
        return f"{key}: got an unknown key, expected one of {', '.join(known)}"
    if kind == "missing":
        return f"{key}: got nothing, expected {describe(annotation)}"
    if kind == "value_error":
        return f"{key}: got {got}: {message}"
    if kind.endswith(("_type", "literal_error")):
        return f"{key}: got {got}, expected {describe(annotation)}"
    return f"{key}: got {got}, expected {re.sub(r'^[A-Z][a-z]+ should (be |have )?', '', message)}"
