"""An experiment's fields, typed and checked, and what is said of one that does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments import Refused

Model = TypeVar("Model", bound=BaseModel)
SIZES = ("smoke", "default", "full")
# The runner's own flags and how many words each takes; no field may have one of these names.
FLAGS = {"help": 0, "list": 0, "smoke": 0, "retry": 0, "size": 1, "out": 1, "shard": 1}
WORDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    dict: ("a table", "tables"),
    type(None): ("null", "nulls"),
}
# Length of a sequence: of a single token softmax is constant, and every gradient zero.
Tokens = Annotated[int, Field(ge=2)]


class Fields(BaseModel):
    """Base of every experiment's Config: no unknown keys, no NaN or inf, no conversions ("3" is not
    3), no changes.

    Write fields that hold lists as tuple[int, ...], and rules between fields as validators that
    raise ValueError.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, strict=True)

    def without(self, names: Iterable[str]) -> Self:
        """A copy in which these fields cannot be read: Refused is raised where one is."""
        copy = self.model_copy()
        for name in names:
            vars(copy).pop(name)
        return copy

    if not TYPE_CHECKING:  # or every misspelt field would pass the type checker

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                read = f"measure reads {name}, which POINTS names"
                raise Refused(f"{type(self).__module__}: {read}; take it out of POINTS")
            return super().__getattr__(name)


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


def _model_in(annotation: Any) -> Any:
    """The model of `Model | None`; any other annotation itself."""
    return next((part for part in get_args(annotation) if _is_model(part)), annotation)


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
        fields = annotation.model_fields
        annotation = _model_in(fields[part].annotation) if part in known else None
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
