"""What a module must hold to be an experiment, and how one is found by its name.

A whole one, in experiments/roots.py:

    from experiments.runner.config import Fields

    POINTS = ("lengths",)


    class Config(Fields):
        lengths: tuple[int, ...]
        factor: float = 2.0


    def points(config):
        return [{"length": n} for n in config.lengths]


    def measure(point, config):
        return {"root": config.factor * point["length"] ** 0.5}

and in configs/roots.toml, where claim, expect, minutes and the fields of other sizes may be added:

    [default]
    lengths = [1, 4, 16]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments import Refused
from experiments.runner.config import FLAGS, Fields

NEEDED = {
    "Config": "a class of experiments.runner.config.Fields",
    "points": "points(config) -> list of dicts, a dict of coordinates for every point",
    "measure": "measure(point, config) -> dict, the metrics of one point",
}


@dataclass(frozen=True)
class Experiment:
    """An experiment's module, as the runner sees it. The module holds

    Config    a class of `Fields`;
    points    config -> list of dicts of JSON values: the coordinates of every point, in a fixed order;
    measure   (point, config) -> dict of JSON values: the metrics of one point; floats may be NaN or infinite;

    and where the default is not what it needs

    VERSION   an integer, 1: bumped by hand whenever `measure` would give other numbers for the same point;
    X64       False: the value of jax_enable_x64 for the run; None for an experiment without jax;
    POINTS    (): names of fields that only make points. Rows do not depend on them, and a longer list keeps the
              rows already there. `measure` cannot read them;
    PLACES    (): names of fields that say where files lie on this machine, which no number depends on;
    inputs    config -> dict of JSON values: what `measure` reads beside the config, as a hash of it.

    All other fields, and the inputs, are part of each row and of its key: a row is never taken for
    one of other fields. The module imports what it needs at its top: the runner reads the command
    line and the lab note before it imports the module, so --help does not wait for jax. It makes no
    array there, for X64 is set between its import and its first point.
    """

    name: str
    fields: type[Fields]
    version: int
    points: Callable[[Any], list[dict[str, Any]]]
    measure: Callable[[dict[str, Any], Any], dict[str, Any]]
    point_fields: tuple[str, ...]
    places: tuple[str, ...]
    inputs: Callable[[Any], dict[str, Any]]
    x64: bool | None

    def depends_on(self, config: Fields) -> dict[str, Any]:
        """All that the row of a point depends on beside the point: fields, by name, and inputs."""
        fields = config.model_dump(mode="json", exclude={*self.point_fields, *self.places})
        read = self.inputs(config)
        clash = sorted(read.keys() & fields.keys())
        if clash:
            raise Refused(f"{self.name}: inputs names {clash[0]}, expected no field's name")
        return fields | read

    def measured(self, config: Fields) -> Fields:
        """The config as `measure` sees it: without the fields that only make points."""
        return config.without(self.point_fields)


def find(name: str, where: str) -> Experiment:
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
    for part, what in NEEDED.items():
        if not hasattr(module, part):
            raise Refused(f"{where}: got {name!r}, which has no {part}; expected in it {what}")
    experiment = Experiment(
        name,
        fields=module.Config,
        version=getattr(module, "VERSION", 1),
        points=module.points,
        measure=module.measure,
        point_fields=tuple(getattr(module, "POINTS", ())),
        places=tuple(getattr(module, "PLACES", ())),
        inputs=getattr(module, "inputs", lambda config: {}),
        x64=getattr(module, "X64", False),
    )
    _check_names(experiment, f"{where}: got {name!r}")
    return experiment


def _check_names(experiment: Experiment, got: str) -> None:
    """Raises Refused, its message opening with `got`, for names of fields that cannot be meant."""
    fields = experiment.fields.model_fields.keys()
    taken = sorted(FLAGS.keys() & fields)
    if taken:
        clash = f"whose field {taken[0]} is a flag of the runner"
        raise Refused(f"{got}, {clash}; expected another name")
    for what, names in (("POINTS", experiment.point_fields), ("PLACES", experiment.places)):
        unknown = sorted(set(names) - fields)
        if unknown:
            known = ", ".join(fields)
            raise Refused(f"{got}, whose {what} name {unknown[0]}; expected fields among {known}")
