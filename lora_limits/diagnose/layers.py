"""Where attention is in a model, and what one window of tokens puts through it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lora_limits.checks import fail

NAMES = ("query", "key", "value")
# (query, key, value) under the names that transformers gives them.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
# One projection for all three; their order in it is found by what it puts out.
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
OUTPUT = ("o_proj", "out_proj", "out_lin", "c_proj", "o", "dense", "Wo")


@dataclasses.dataclass(frozen=True)
class Place:
    """One attention module of a model: its projections, by their paths."""

    number: int
    path: str
    projections: dict[str, str]  # all the same where they are fused
    fused: bool
    out: str | None  # path of the output projection


@dataclasses.dataclass(frozen=True)
class Mask:
    """Query i sees keys i - back to i + ahead, and no other; no limit where it is None."""

    back: int | None = None
    ahead: int | None = None

    @property
    def causal(self) -> bool:
        """Whether nothing that comes later is seen."""
        return self.ahead == 0

    @property
    def window(self) -> bool:
        """Whether what lies far back is not seen."""
        return self.back is not None

    def visible(self, queries: Int[np.ndarray, " l"], tokens: int) -> Bool[np.ndarray, "l tokens"]:
        """Which of the keys each of the queries, given by their positions, sees."""
        distance = np.subtract.outer(queries, np.arange(tokens))
        back = tokens if self.back is None else self.back
        ahead = tokens if self.ahead is None else self.ahead
        return (distance <= back) & (distance >= -ahead)


@dataclasses.dataclass
class Layer:
    """What one window put through one attention module; heads by their number.

    Queries, keys and values are as they meet in the scores, positions applied. residual: dl/dO of
    the task's loss, of each head's output O before the output projection; empty where there is no
    loss. output: the model's own O, of all heads side by side, where it was asked for.
    """

    heads: int
    groups: int  # key-value heads
    scaling: float  # what multiplies the scores
    mask: Mask | None  # None: anything else, positions added to the scores among them
    x: dict[str, Float[np.ndarray, "l d_model"]]
    query: dict[int, Float[np.ndarray, "l d"]]
    key: dict[int, Float[np.ndarray, "l d"]]
    value: dict[int, Float[np.ndarray, "l dv"]]
    residual: dict[int, Float[np.ndarray, "l dv"]] = dataclasses.field(default_factory=dict)
    output: Float[np.ndarray, "l heads_dv"] | None = None
    special: str | None = None  # what its scores do beside softmax, in words

    def group(self, head: int) -> int:
        """The key-value head of a head: heads share them in runs of heads / groups."""
        return head * self.groups // self.heads


def find_places(model: Any) -> list[Place]:
    """The attention modules of a model, in order.

    Raises ValueError where no query, key and value are found.
    """
    found: list[Place] = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        names = next((n for n in SEPARATE if all(c in children for c in n)), None)
        # With q_attn beside it the fused projection is of keys and values only (cross-attention).
        fused = next((n for n in FUSED if n in children and "q_attn" not in children), None)
        if names is None and fused is None:
            continue
        places = dict(zip(NAMES, names or (fused,) * 3, strict=True))
        projections = {n: f"{path}.{c}" for n, c in places.items()}
        out = _output(model, path, children)
        found.append(Place(len(found), path, projections, names is None, out))
    if not found:
        known = " or ".join([*(", ".join(names) for names in SEPARATE), *FUSED])
        fail(type(model).__name__, "no attention projections", f"modules named {known}")
    return found


def _output(model: Any, path: str, children: dict[str, Any]) -> str | None:
    """The output projection: a child, or as in BERT the dense layer beside the attention module."""
    inside = next((n for n in OUTPUT if n in children), None)
    if inside:
        return f"{path}.{inside}"
    beside = f"{path.rpartition('.')[0]}.output.dense"
    return beside if any(name == beside for name, _ in model.named_modules()) else None


def block_of(model: Any, place: Place) -> str | None:
    """The path of the block that an attention module lies in: the nearest member of a list."""
    modules = dict(model.named_modules())
    parts = place.path.split(".")
    for end in range(len(parts), 0, -1):
        parent = modules.get(".".join(parts[: end - 1]))
        if type(parent).__name__ == "ModuleList":
            return ".".join(parts[:end])
    return None


def read_mask(hidden: Bool[np.ndarray, "l l"]) -> Mask | None:
    """The band that is left visible; None where it is no band."""
    tokens = len(hidden)
    visible = ~hidden
    rows = np.arange(tokens)
    first = visible.argmax(1)
    last = tokens - 1 - visible[:, ::-1].argmax(1)
    back, ahead = int((rows - first).max()), int((last - rows).max())
    # Every query sees what lies between, all of it, as far as there are tokens.
    ends = (first == np.maximum(rows - back, 0)) & (last == np.minimum(rows + ahead, tokens - 1))
    if not (ends & (visible.sum(1) == last - first + 1)).all():
        return None
    # A band as wide as the window is no limit.
    return Mask(None if back >= tokens - 1 else back, None if ahead >= tokens - 1 else ahead)
