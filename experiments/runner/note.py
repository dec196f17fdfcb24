"""The config file, a lab note in TOML: what it says, and the fields of an experiment it asks for."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat

from experiments import Refused
from experiments.runner import experiment
from experiments.runner.config import SIZES, Fields, check

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLE = '[default] and under it a line a field, as in "lengths = [256, 512]"'


class Minutes(Fields):
    """About how long each size takes on two idle cores."""

    smoke: PositiveFloat
    default: PositiveFloat
    full: PositiveFloat


class Note(Fields):
    """A config file: what is tested, how to run it, how long it takes, what to expect, and each
    size's fields.

    experiment: a module, that of the file's own name unless said. All but `default` may be left
    out; smoke and full say what they have otherwise than default.
    """

    experiment: str = ""
    claim: str = ""
    command: str = ""
    minutes: Minutes | None = None
    expect: str = ""
    default: dict[str, Any]
    smoke: dict[str, Any] = Field(default_factory=dict)
    full: dict[str, Any] = Field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A config file at one size, checked: `config` is an instance of the experiment's Config."""

    path: Path
    size: str
    note: Note
    experiment: experiment.Experiment
    config: Fields

    @property
    def name(self) -> str:
        """That of the file, by which its results are found."""
        return self.path.stem

    def identity(self) -> dict[str, Any]:
        """What makes its measurements what they are: experiment, version, and fields (and inputs)
        that rows depend on.
        """
        own = self.experiment
        return {
            "experiment": own.name,
            "version": own.version,
            "fields": own.depends_on(self.config),
        }


def read(path: str | Path) -> Note:
    """What a config file says, its fields not yet checked, for that needs the experiment's module.

    Raises Refused for a file that cannot be read, and for keys that no note has.
    """
    path = Path(path)
    try:
        # With or without the byte order mark that some editors write.
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(
            f"{path}: {error.strerror}, expected a config file (--list shows those there are)"
        ) from None
    except ValueError as error:
        raise Refused(
            f"{path}: got text that is not TOML ({error}), expected a config file"
        ) from None
    if "default" not in table:
        raise Refused(f"{path}: got no fields, expected {EXAMPLE}")
    return check(Note, {f"{path}: ": table})


def load(path: str | Path, size: str = "default") -> Sweep:
    """Read a config file and check all three sizes of it.

    Raises Refused as `read`, and for an experiment that cannot be found, an unknown field, a value
    of another type or out of range.
    """
    path = Path(path)
    if size not in SIZES:
        raise Refused(f"--size: got {size!r}, expected one of {', '.join(SIZES)}")
    note = read(path)
    found = experiment.find(note.experiment or path.stem, where=f"{path}: experiment")
    configs = {name: _fields(found, note, path, name) for name in SIZES}
    return Sweep(path, size, note, found, configs[size])


def _fields(found: experiment.Experiment, note: Note, path: Path, size: str) -> Fields:
    layers = {f"{path}: default.": note.default}
    if size != "default":
        layers[f"{path}: {size}."] = getattr(note, size)
    return check(found.fields, layers)


def override(loaded: Sweep, values: Mapping[str, Any]) -> Sweep:
    """The sweep with these fields changed, its config checked anew. Raises Refused as `load`."""
    # A new instance, for model_copy(update=...) would take any value.
    layers = {"": loaded.config.model_dump(mode="json"), "--": values}
    return dataclasses.replace(loaded, config=check(loaded.experiment.fields, layers))
