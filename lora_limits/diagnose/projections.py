"""Projections of all heads with the halves of their adapters, read from a model that peft adapted.

peft adds scaling * x A_p^T B_p^T with A_p (r, d_model), B_p (out, r): so b = A_p^T and a = B_p^T.
Head h of a projection has its own columns of a and shares b with the others; in a fused projection
query, key, value share b too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lora_limits.checks import fail
from lora_limits.diagnose.layers import NAMES, Layer, Place
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.problem import Adapter

PARTS = 4  # in which CodeGen's fused projection is laid out


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of all heads, and its adapter; b and a are None without one.

    columns: where these columns lie in a fused projection; None where they are the whole.
    """

    weight: Float[np.ndarray, "d_model heads_d"]
    bias: Float[np.ndarray, " heads_d"] | None
    b: Float[np.ndarray, "d_model r"] | None
    a: Float[np.ndarray, "r heads_d"] | None
    scale: float
    columns: Int[np.ndarray, " heads_d"] | None = None

    def take(self, columns: Int[np.ndarray, " n"]) -> Projection:
        """Some of its columns."""
        return Projection(
            self.weight[:, columns],
            None if self.bias is None else self.bias[columns],
            self.b,
            None if self.a is None else self.a[:, columns],
            self.scale,
            columns,
        )


def read_projections(model: Any, place: Place, layer: Layer) -> dict[str, Projection]:
    """Query, key and value of an attention module, heads side by side in each.

    model: the base model, adapted in place or not. layer: a recording of the module, by which the
    order of a fused projection is known: the one that puts out the values it recorded.
    Raises ValueError for more than one adapter on a module, and for a fused projection in no order
    that is known.
    """
    if not place.fused:
        return {name: _read(model, place.projections[name]) for name in NAMES}
    path = place.projections["query"]
    whole = _read(model, path)
    found = [{n: whole.take(c) for n, c in layout.items()} for layout in _layouts(whole, layer)]
    gaps = [_value_gap(parts["value"], layer) for parts in found]
    if not gaps:
        got = f"{whole.weight.shape[1]} columns for {layer.heads} heads on {layer.groups} keys"
        fail(path, got, "a fused projection whose layout is known")
    return found[int(np.argmin(gaps))]


def _read(model: Any, path: str) -> Projection:
    """The weight, bias and adapter of one module."""
    module = model.get_submodule(path)
    base = getattr(module, "base_layer", module)
    weight = _numpy(base.weight)
    # The linear layers of torch hold (out, in).
    if type(base).__name__ != "Conv1D":
        weight = weight.T
    bias = None if getattr(base, "bias", None) is None else _numpy(base.bias)
    held = list(getattr(module, "lora_A", {}))
    if len(held) > 1:
        fail(path, f"adapters {held}", "one")
    if not held:
        return Projection(weight, bias, None, None, 1.0)
    b = _numpy(module.lora_A[held[0]].weight).T
    a = _numpy(module.lora_B[held[0]].weight).T
    return Projection(weight, bias, b, a, float(module.scaling[held[0]]))


def _layouts(whole: Projection, layer: Layer) -> Iterator[dict[str, np.ndarray]]:
    """The orders in which fused columns may lie: all queries first, or group by group."""
    heads, groups = layer.heads, layer.groups
    d = next(iter(layer.query.values())).shape[1]
    dv = next(iter(layer.value.values())).shape[1]
    sizes = {"query": heads * d, "key": groups * d, "value": groups * dv}
    if sum(sizes.values()) != whole.weight.shape[1]:
        return
    for order, parts in ((NAMES, 1), (NAMES, groups), (("query", "value", "key"), PARTS)):
        # In CodeGen heads come in four parts, values before keys.
        if groups % parts or heads % parts:
            continue
        columns = np.arange(sum(sizes.values())).reshape(parts, -1)
        ends = np.cumsum([sizes[name] // parts for name in order])[:-1]
        pieces = np.split(columns, ends, axis=1)
        yield {name: piece.ravel() for name, piece in zip(order, pieces, strict=True)}


def _value_gap(value: Projection, layer: Layer) -> float:
    """How far a layout's values are from the recorded ones, in the worst group."""
    y = layer.x["value"] @ value.weight
    if value.bias is not None:
        y = y + value.bias
    if value.b is not None and value.a is not None:
        y = y + value.scale * (layer.x["value"] @ value.b) @ value.a
    own = y.reshape(len(y), layer.groups, -1)
    gaps = [frobenius_error(own[:, g], rows) for g, rows in layer.value.items()]
    return float(np.nan_to_num(max(gaps), nan=np.inf))


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def join(
    heads: Sequence[Adapter], d_model: int, columns: Int[np.ndarray, " n"] | None = None
) -> Adapter:
    """The adapter of a projection from those of its heads, in order: b shared, a side by side.

    For a fused projection: the heads of query, then key, then value, and `columns`, theirs in
    turn. d_model: the rows of b that peft holds; one more is the row of a bias, which peft has no
    place for.
    Raises ValueError for heads that do not share b, and for an update of the bias.
    """
    b = np.asarray(heads[0].b)
    if not all(np.array_equal(np.asarray(head.b), b) for head in heads):
        fail("adapters", "heads with different b", "one b that they share")
    if np.any(b[d_model:]):
        fail("adapters", "an update of the bias", "zeros in the last row of b")
    a = np.concatenate([np.asarray(head.a) for head in heads], axis=1)
    if columns is not None:
        a = a[:, np.argsort(columns)]
    return Adapter(a, b[:d_model])
