"""Shapes in annotations, checked: functions by an import hook, NamedTuples where they are made.

JAX rebuilds NamedTuples around anything (tracers of other shapes, axes, None), and that is none of
our business: a constructor is checked when a line of the library calls it.
"""

import re
import sys
import typing

from beartype import beartype
from jaxtyping import install_import_hook, jaxtyped

PACKAGE = "lora_limits"
SHAPED = re.compile(r"\b(Float|Int|Bool|Key|Shaped)\[")


def install():
    """Checks every function and NamedTuple of the library's modules that are imported from here on."""
    install_import_hook(PACKAGE, f"{__name__}.arrays_only")
    make_class = typing.NamedTupleMeta.__new__

    def make_checked_class(meta, name, bases, namespace):
        cls = make_class(meta, name, bases, namespace)
        if of_the_library(namespace["__module__"]):
            cls.__new__ = checked(cls, cls.__new__)
        return cls

    typing.NamedTupleMeta.__new__ = make_checked_class


def arrays_only(function):
    """beartype on the annotations that name a shape; the rest is for the library's own refusals."""
    hints = function.__annotations__
    function.__annotations__ = {name: h for name, h in hints.items() if SHAPED.search(str(h))}
    return beartype(function)


def of_the_library(module):
    return module.partition(".")[0] == PACKAGE


def checked(cls, make):
    """The constructor of a NamedTuple, which raises for fields that do not fit their annotations."""
    fits = None

    def make_checked(cls, *args, **kwargs):
        nonlocal fits
        made = make(cls, *args, **kwargs)
        if of_the_library(sys._getframe(1).f_globals.get("__name__", "")):
            fits = fits or fitting(cls)
            fits(*made)
        return made

    return make_checked


def fitting(cls):
    """A function of the fields that raises unless each fits, a name standing for one size in all."""
    scope = {}
    exec(f"def {cls.__name__}({', '.join(cls._fields)}): pass", scope)
    function = scope[cls.__name__]
    function.__annotations__ = typing.get_type_hints(cls, include_extras=True)
    return jaxtyped(function, typechecker=arrays_only)
