"""Operations, memory and what devices tell each other, read off a jaxpr: nothing is run or compiled.

`cost_analysis` of a compiled program counts the body of a loop once; here a scan counts as often as
it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from lora_limits.checks import fail

COLLECTIVES = ("psum", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "reduce_scatter")


def count_operations(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """What `function(*args)` would do, args being arrays or jax.ShapeDtypeStruct.

    flops: 2 n for every inner product of length n in a dot_general, loops multiplied out; of
    several branches the dearest counts. largest: elements of the largest array that any step
    produces, at any depth; arguments are not counted.
    What no result depends on is not counted: jit would not run it either.
    Raises ValueError for a while loop, whose length is not known.
    """
    traced = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    flops, largest = _count(needed)
    return {"flops": flops, "largest": largest}


def exchanged_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that every device tells the others in `function(*args)`, on a mesh of any kind.

    Of a sum, a maximum or a minimum the array that goes in; of a gathering the one that comes out.
    Loops multiplied out; of several branches the one that says most. What no result depends on is
    not counted.
    """
    traced = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _exchanged(needed)


def _exchanged(jaxpr: core.Jaxpr) -> int:
    said = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name.startswith(COLLECTIVES):
            arrays = eqn.outvars if name.startswith("all_gather") else eqn.invars
            said += sum(_bytes(v) for v in arrays)
            continue
        inner = [_exchanged(sub) for sub in _sub_jaxprs(eqn)]
        repeat = eqn.params["length"] if name == "scan" else 1
        said += repeat * (max if name == "cond" else sum)(inner or [0])
    return said


def _count(jaxpr: core.Jaxpr) -> tuple[int, int]:
    """(flops, largest) of a jaxpr and of those inside of it."""
    flops = 0
    largest = 0
    for eqn in jaxpr.eqns:
        largest = max(largest, *(_elements(v) for v in eqn.outvars), 0)
        if eqn.primitive.name == "dot_general":
            flops += _dot_flops(eqn)
            continue
        # How often it runs is only known by running it.
        if eqn.primitive.name == "while":
            fail("while loop", "an unknown number of iterations", "a scan")
        inner = [_count(sub) for sub in _sub_jaxprs(eqn)]
        if inner:
            # A scan runs its body `length` times, a cond one of its branches, others all they hold.
            repeat = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            combine = max if eqn.primitive.name == "cond" else sum
            flops += repeat * combine(f for f, _ in inner)
            largest = max(largest, *(size for _, size in inner))
    return flops, largest


def _elements(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _bytes(variable: Any) -> int:
    return _elements(variable) * variable.aval.dtype.itemsize


def _dot_flops(eqn: core.JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    aval: Any = eqn.invars[0].aval
    length = math.prod(aval.shape[i] for i in contracted)
    return 2 * length * _elements(eqn.outvars[0])


def _sub_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs that an equation carries as parameters: bodies, branches, calls."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
