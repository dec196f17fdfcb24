"""What a LoRAProblem must be: names, shapes and dtypes that fit, finite numbers, beta > 0.

Problems are known here by their fields alone, as problem.py imports this module.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_limits.checks import check_integer, check_number, fail

NAMES = ("query", "key", "value")
# Which mask says what there is of the arrays over tokens.
MASKS = {
    "x_query": "query_mask",
    "target": "query_mask",
    "x_key": "key_mask",
    "x_value": "key_mask",
}
# What a problem may have beside inputs, weights and adapters. Few methods know all of it.
STRUCTURE = ("causal", "window", "rotations", "query_mask", "key_mask", "segments")


def structure_of(problem: Any) -> tuple[str, ...]:
    """Which of STRUCTURE the problem has."""
    given = ((name, getattr(problem, name)) for name in STRUCTURE)
    return tuple(name for name, value in given if value is not None and value is not False)


def refuse_structure(problem: Any, who: str, known: Collection[str] = ()) -> None:
    """Raises ValueError, in one line, for what the problem has and `who` knows nothing of."""
    for name in structure_of(problem):
        if name not in known:
            value = getattr(problem, name)
            got = value if name in ("causal", "window") else "some"
            fail(name, got, f"none: {who} does not know it (Exact does)")


def check_static(problem: Any) -> None:
    """Checks all that is known without running: names, shapes, dtypes. Raises ValueError; O(1)."""
    unknown = sorted(set(problem.adapters) - set(NAMES))
    if unknown:
        fail("adapters", unknown, f"names among {list(NAMES)}")
    if not problem.adapters:
        fail("adapters", "none", f"at least one of {list(NAMES)}")
    for name, value in _arrays(problem).items():
        if not hasattr(value, "dtype") or np.ndim(value) != 2:
            got = f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
            fail(name, got, "a 2-d array (vmap over a batch of problems)")
        _check_dtype(name, value, problem.x_query)
    # From here on every array is known to be a matrix.
    _check_inputs(problem)
    for name, adapter in problem.adapters.items():
        _check_adapter(name, adapter, *getattr(problem.weights, name).shape)
    for name in ("scale", "beta"):
        value = getattr(problem, name)
        if np.ndim(value) != 0:
            fail(name, f"shape {np.shape(value)}", "a scalar")
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            check_number(name, value)
    if structure_of(problem):
        _check_structure(problem)


def _check_structure(problem: Any) -> None:
    """Raises ValueError unless masks, segments and rotations fit the tokens."""
    lq, d = problem.x_query.shape[0], problem.weights.query.shape[1]
    lk = problem.x_key.shape[0]
    if not isinstance(problem.causal, bool):
        fail("causal", repr(problem.causal), "True or False, known while tracing")
    if problem.window is not None:
        check_integer("window", problem.window, 1)
        if not problem.causal:
            fail("window", problem.window, "one beside causal=True: the last keys that are seen")
    _check_vector("query_mask", problem.query_mask, lq, jnp.bool_, "booleans")
    _check_vector("key_mask", problem.key_mask, lk, jnp.bool_, "booleans")
    _check_vector("segments", problem.segments, lq, jnp.integer, "integers")
    for name, given in (("causal", problem.causal), ("segments", problem.segments is not None)):
        if given and lq != lk:
            fail(f"x_key of a problem with {name}", f"{lk} tokens", f"{lq}, as many as x_query")
    if problem.rotations is not None:
        _check_rotations(problem, d)


def _check_vector(name: str, value: Any, length: int, kind: Any, expected: str) -> None:
    if value is None:
        return
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, kind):
        got = getattr(value, "dtype", type(value).__name__)
        fail(name, got, f"{expected} of shape {(length,)}")
    if value.shape != (length,):
        fail(name, f"shape {value.shape}", (length,))


def _check_rotations(problem: Any, d: int) -> None:
    """Raises ValueError unless there are as many angles for queries as for keys, d / 2 at most."""
    for name in ("query", "key"):
        value = getattr(problem.rotations, name)
        length = getattr(problem, f"x_{name}").shape[0]
        name = f"rotations of the {name}"
        if not hasattr(value, "dtype") or np.ndim(value) != 2:
            got = f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
            fail(name, got, f"angles of shape ({length}, n)")
        _check_dtype(name, value, problem.x_query)
        if value.shape[0] != length:
            fail(name, f"{value.shape[0]} tokens", f"{length}, as many as there are")
        if not 0 < 2 * value.shape[1] <= d:
            fail(name, f"{value.shape[1]} angles", f"from 1 to {d // 2}, half of the width {d}")
    counts = [x.shape[1] for x in problem.rotations]
    if counts[0] != counts[1]:
        fail("rotations of the key", f"{counts[1]} angles", f"{counts[0]}, as many as of the query")


def _check_dtype(name: str, value: Any, first: Any) -> None:
    """Raises ValueError unless an array can be computed with, and beside the first one."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        fail(name, f"dtype {value.dtype}", "a floating dtype")
    # What NumPy holds in double precision JAX will hold in the one that it is set to.
    dtype, wanted = (jax.dtypes.canonicalize_dtype(x.dtype) for x in (value, first))
    if jnp.finfo(dtype).bits < 32:
        remedy = "float32 or float64, in which gradients are computed: convert with .astype"
        fail(name, f"dtype {dtype}", remedy)
    if dtype != wanted:
        fail(name, f"dtype {dtype}", f"{wanted}, the dtype of x_query")


def _arrays(problem: Any) -> dict[str, Any]:
    """Every matrix by its name in messages, x_query first, whose dtype is that of all."""
    arrays = {f"x_{name}": getattr(problem, f"x_{name}") for name in NAMES}
    arrays["target"] = problem.target
    arrays |= {f"weights.{name}": getattr(problem.weights, name) for name in NAMES}
    for name, adapter in problem.adapters.items():
        arrays[f"adapters[{name!r}].a"] = adapter.a
        arrays[f"adapters[{name!r}].b"] = adapter.b
    return arrays


def _check_inputs(problem: Any) -> None:
    """Raises ValueError unless inputs, weights and target have shapes that fit together."""
    x = {name: getattr(problem, f"x_{name}").shape for name in NAMES}
    w = {name: getattr(problem.weights, name).shape for name in NAMES}
    if 0 in (*x["query"], *x["key"], *w["query"], *w["value"]):
        fail("shapes", [*x.values(), *w.values()], "no empty dimension")
    for name in NAMES:
        if x[name][1] != w[name][0]:
            expected = f"({x[name][1]}, ...) to fit x_{name} {x[name]}"
            fail(f"weights.{name}", f"shape {w[name]}", expected)
    if w["query"][1] != w["key"][1]:
        expected = f"{w['query'][1]}, the width of weights.query"
        fail("weights.key", f"width {w['key'][1]}", expected)
    # Widths may differ, numbers of tokens may not: value j belongs to key j.
    if x["key"][0] != x["value"][0]:
        fail("x_value", f"{x['value'][0]} tokens", f"{x['key'][0]}, as many as x_key")
    expected = (x["query"][0], w["value"][1])
    if problem.target.shape != expected:
        fail("target", f"shape {problem.target.shape}", expected)


def _check_adapter(name: str, adapter: Any, d_model: int, d: int) -> None:
    """Raises ValueError unless the adapter is one of a projection (d_model, d)."""
    r = adapter.a.shape[0]
    if r == 0:
        fail(f"adapters[{name!r}]", "rank 0", "rank at least 1")
    if adapter.a.shape != (r, d):
        fail(f"adapters[{name!r}].a", f"shape {adapter.a.shape}", (r, d))
    if adapter.b.shape != (d_model, r):
        fail(f"adapters[{name!r}].b", f"shape {adapter.b.shape}", (d_model, r))


def check_values(problem: Any) -> None:
    """Checks concrete values: finite entries, beta > 0. Raises ValueError.

    Reads every array that it can: tracers pass, and arrays of which other processes hold a part.
    Tokens that a mask says are not there may hold anything.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(problem):
        if not _readable(leaf):
            continue
        mask = getattr(problem, MASKS.get(path[0].name, ""), None)
        if mask is not None and not _readable(mask):
            continue
        values = np.asarray(leaf) if mask is None else np.asarray(leaf)[np.asarray(mask)]
        if not bool(np.isfinite(values).all()):
            name = jax.tree_util.keystr(path).lstrip(".")
            fail(name, "NaN or infinite entries", "finite numbers")
    # beta <= 0 would turn the order of the scores, which no theorem allows.
    if not isinstance(problem.beta, Tracer) and not float(problem.beta) > 0:
        fail("beta", problem.beta, "an inverse temperature above 0")


def _readable(leaf: Any) -> bool:
    """Whether a leaf holds numbers that this process can look at."""
    if isinstance(leaf, Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray | np.generic | float | int)
