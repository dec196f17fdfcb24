"""The LoRA attention problem: inputs, frozen weights, adapters; the paper's C1, C2 and C3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_limits.checks import fail
from lora_limits.linalg import AnyArray, columns_of, dot
from lora_limits.problem_checks import NAMES, check_static, check_values, structure_of
from lora_limits.rotary import as_rotations, rotate, rotate_back

__all__ = [
    "NAMES",
    "Adapter",
    "AttentionWeights",
    "LoRAProblem",
    "as_jax",
    "batch_axes",
    "check_static",
    "check_values",
    "inputs",
    "project",
    "project_back",
    "project_columns",
    "projections",
    "pull_back",
    "reduced_form",
    "replaced",
    "scalars",
]


def _pytree(cls):
    """Registers a dataclass whose every field is data, unless its metadata say that it is static.

    Rebuilding it never validates: JAX rebuilds around tracers, axes and None.
    """
    fields = dataclasses.fields(cls)
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    names = tuple(f.name for f in fields if f.name not in static)

    def flatten_with_keys(x):
        children = tuple((jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in names)
        return children, tuple(getattr(x, n) for n in static)

    def unflatten(known, children):
        # not by the constructor, which checks
        out = object.__new__(cls)
        for name, value in zip((*names, *static), (*children, *known), strict=True):
            object.__setattr__(out, name, value)
        return out

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@_pytree
@dataclasses.dataclass(frozen=True)
class Adapter:
    """One low-rank update, W = W* + scale * b @ a (Definition 1.1), a: (r, d), b: (d_model, r).

    Also holds its gradient, or a bound on it.
    """

    a: Any
    b: Any


@_pytree
@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """Frozen projections, used as X @ W. query, key: (d_model, d); value: (d_model, d_value)."""

    query: Any
    key: Any
    value: Any


@_pytree
@dataclasses.dataclass(frozen=True, init=False)
class LoRAProblem:
    """One attention head, one data point, some projections adapted (Definitions 1.2, 3.1, A.1).

    loss = 1/2 || softmax(beta Q K^T) V - Y ||_F^2 with Q = X_Q (W*_Q + scale B_Q A_Q), and so for K
    and V.

    x_query: (Lq, d_model); x_key, x_value: (Lk, d_model), each width its own; target:
    (Lq, d_value). weights: AttentionWeights; adapters: {"query" | "key" | "value": Adapter}, any
    non-empty subset. scale = alpha / r (or alpha / sqrt(r)); beta: inverse temperature, 1/sqrt(d)
    in practice, 1/d in the theory.

    What models have beside it, each None or False unless given:
    rotations: angles of rotary positions, (L, n) for queries and keys alike or a pair of (Lq, n)
    and (Lk, n); Q and K are turned by them before they meet (rotary.py has the layout).
    query_mask (Lq,), key_mask (Lk,): booleans, which tokens there are. The loss counts the queries
    that there are; what other tokens hold matters to nothing, NaN included.
    causal: query i sees keys 0 .. i. window = w, with causal: the last w of these alone.
    segments (L,): integers; tokens see those of their own run of equal numbers alone (packed
    documents; two runs of one number are two documents).
    A query that sees no key gives the output 0. causal and segments are of self-attention: as many
    queries as keys, the same tokens.

    A pytree: every array and both scalars are leaves, so jit, vmap and tree_map apply; causal and
    window are static.
    Raises ValueError, with what was got and what was expected, for shapes or dtypes that do not
    fit, unknown or missing adapters, beta <= 0, and non-finite entries in concrete arrays.
    """

    x_query: Any
    x_key: Any
    x_value: Any
    target: Any
    weights: AttentionWeights
    adapters: dict[str, Adapter]
    scale: Any
    beta: Any
    rotations: Any = None
    query_mask: Any = None
    key_mask: Any = None
    segments: Any = None
    causal: bool = _static(False)
    window: int | None = _static(None)

    def __init__(
        self,
        x_query: Any,
        x_key: Any,
        x_value: Any,
        target: Any,
        *,
        weights: AttentionWeights,
        adapters: Mapping[str, Adapter],
        scale: Any,
        beta: Any,
        rotations: Any = None,
        query_mask: Any = None,
        key_mask: Any = None,
        segments: Any = None,
        causal: bool = False,
        window: int | None = None,
    ):
        given = dict(locals())
        given.pop("self")
        given["adapters"] = dict(adapters)
        given["rotations"] = as_rotations(rotations)
        # A frozen class: its fields are set behind its back.
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given[field.name])
        check_static(self)
        check_values(self)

    @property
    def dtype(self) -> Any:
        """The dtype that everything is computed in: that of every array."""
        return jnp.result_type(self.weights.query)


def inputs(problem: LoRAProblem) -> dict[str, Any]:
    """The three input sequences by the name of their projection."""
    return {"query": problem.x_query, "key": problem.x_key, "value": problem.x_value}


def as_jax(problem: LoRAProblem) -> LoRAProblem:
    """The problem with its NumPy arrays as JAX's."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, problem)


def replaced(problem: LoRAProblem, **changes: Any) -> LoRAProblem:
    """The problem with some fields changed and nothing checked: arrays may be traced, or hold what
    no token of the problem has.
    """
    out = object.__new__(LoRAProblem)
    for field in dataclasses.fields(problem):
        object.__setattr__(out, field.name, changes.get(field.name, getattr(problem, field.name)))
    return out


def batch_axes(problem: LoRAProblem, *names: str) -> LoRAProblem:
    """in_axes for jax.vmap over problems that share all but what is named: 0 for that, None else.

    names: "x_query", "target", "weights.query", "adapters.query", "adapters.key.a", ...; none: all,
    a batch of problems that share nothing. Grouped queries are "weights.query", "adapters.query"
    and "target" stacked, with the keys and values of all heads written once; what is computed from
    these alone is then computed once: their projections by every method, and with
    Polynomial(..., centred=False) in a causal problem the sums over keys too (centres are made of a
    head's own queries). The gradient of what is shared is the sum over the batch.
    Raises ValueError for a name that is not in the problem.
    """
    found = set()

    def axis(path, _):
        dotted = ".".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
        given = {name for name in names if f"{dotted}.".startswith(f"{name}.")}
        found.update(given)
        return 0 if given or not names else None

    axes = jax.tree_util.tree_map_with_path(axis, problem)
    unknown = sorted(set(names) - found)
    if unknown:
        fail("batch_axes", unknown, "names such as x_query, weights.query, adapters.query.a")
    return axes


def scalars(problem: LoRAProblem) -> tuple[jax.Array, jax.Array]:
    """(scale, beta) in the dtype of the problem."""
    return jnp.asarray(problem.scale, problem.dtype), jnp.asarray(problem.beta, problem.dtype)


def project(problem: LoRAProblem, name: str, x: Float[AnyArray, "n d_in"]) -> Float[Array, "n d"]:
    """x (W* + scale B A) for the projection `name`, never forming B A. O(n d_in (d + r))."""
    # x B first: its r columns are few beside those of B A.
    y = dot(x, getattr(problem.weights, name))
    if name in problem.adapters:
        adapter = problem.adapters[name]
        y = y + scalars(problem)[0] * dot(dot(x, adapter.b), adapter.a)
    return y


def project_columns(
    problem: LoRAProblem, name: str, x: Float[AnyArray, "n d_in"]
) -> Float[Array, "d n"]:
    """`project`, tokens last."""
    y = columns_of(getattr(problem.weights, name), x)
    if name in problem.adapters:
        adapter = problem.adapters[name]
        y = y + scalars(problem)[0] * dot(adapter.a.T, columns_of(adapter.b, x))
    return y


def project_back(
    problem: LoRAProblem, name: str, rows: Float[AnyArray, "n d"]
) -> Float[Array, "n d_in"]:
    """rows (W* + scale B A)^T: from the space of the projection to that of its inputs."""
    y = dot(rows, getattr(problem.weights, name).T)
    if name in problem.adapters:
        adapter = problem.adapters[name]
        y = y + scalars(problem)[0] * dot(dot(rows, adapter.a.T), adapter.b.T)
    return y


def projections(
    problem: LoRAProblem,
) -> tuple[Float[Array, "lq d"], Float[Array, "lk d"], Float[Array, "lk dv"]]:
    """Q, K, V with the adapters in; Q and K turned by the rotations, if there are any."""
    q, k, v = (project(problem, name, x) for name, x in inputs(problem).items())
    if problem.rotations is not None:
        q, k = rotate(q, problem.rotations.query), rotate(k, problem.rotations.key)
    return q, k, v


def pull_back(problem: LoRAProblem, name: str, rows: Float[AnyArray, "n d"]) -> Adapter:
    """Gradient of an adapter from that of its projection, dH = dl/d(X W), as `projections` has it.

    dA = s (X B)^T dH,  dB = s X^T (dH A^T): the (d_in, d) matrix dl/dW is never formed. With
    rotations rows are those of R_i (x_i W), and dH_i = R_i^T rows_i. O(n r (d_in + d)).
    """
    if problem.rotations is not None and name != "value":
        rows = rotate_back(rows, getattr(problem.rotations, name))
    x = inputs(problem)[name]
    adapter = problem.adapters[name]
    scale = scalars(problem)[0]
    da = scale * dot(dot(x, adapter.b).T, rows)
    db = scale * dot(x.T, dot(rows, adapter.a.T))
    return Adapter(da, db)


def reduced_form(problem: LoRAProblem) -> dict[str, jax.Array]:
    """The reduced problem (3.3), in which Q K^T beta = C1 Wbar C2^T, by name. scale must not be 0.

    C1 = s X_Q (Lq, d_model),    C2 = beta X_K W_K (Lk, d),    C3 = X_V W_V (Lk, d_value),
    Wbar = W*_Q / s + B_Q A_Q (d_model, d)

    Raises ValueError for a problem with rotations, whose scores are no such product.
    """
    if "rotations" in structure_of(problem):
        fail("rotations of a reduced form", "some", "none: they stand between Q and K")
    scale, beta = scalars(problem)
    _, k, v = projections(problem)
    # s (W*_Q / s + B_Q A_Q) = W_Q: the scale goes into C1, the temperature into C2.
    wbar = problem.weights.query / scale
    if "query" in problem.adapters:
        wbar = wbar + dot(problem.adapters["query"].b, problem.adapters["query"].a)
    return {"C1": scale * problem.x_query, "C2": beta * k, "C3": v, "Wbar": wbar}
