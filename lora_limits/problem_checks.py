"""What a LoRAProblem must be: names, shapes and dtypes that fit, finite numbers, beta > 0.

Problems are known here by their fields alone, as problem.py imports this module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_limits.checks import check_number, fail

NAMES = ("query", "key", "value")


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
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(problem):
        if _readable(leaf) and not bool(np.isfinite(np.asarray(leaf)).all()):
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
