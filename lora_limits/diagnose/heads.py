"""From a recording to a LoRAProblem a head, after checks that it is the model's own attention.

Three forms. `projected`: Q = c (X W_Q + bias) with the adapter in, so that the problem has the
model's own X, weights and adapters (c, a factor some models put on the query, goes into beta).
`rotary`: the same under rotary positions, which the problem has as its rotations. `recorded`:
something else stands between projections and scores (a normalisation), which no single W expresses;
the problem then starts from the recorded Q and K with identity weights, and only the value adapter
has a gradient. Biases are a column of ones in X; the key's cancels in the softmax and is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_limits.diagnose.layers import NAMES, Layer, Mask
from lora_limits.diagnose.outputs import attend
from lora_limits.diagnose.parts import Inputs, Part, take_part
from lora_limits.diagnose.positions import Rotary, find_rotary, turn
from lora_limits.diagnose.projections import Projection
from lora_limits.instruments.comparing import frobenius_error
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem

CLOSE = 1e-3  # relative, of what is rebuilt in float32 against what the model computed
RECORDED = "a normalisation stands between this projection and the scores"
NOISE = 0.1  # of the stand-in target, beside the root mean square of the head's output


class Refused(ValueError):
    """A head that cannot be analysed; the message says why in one line."""


class Scores(NamedTuple):
    """Queries and keys as they meet: scores are scale <query, key>."""

    query: Float[np.ndarray, "l d"]
    key: Float[np.ndarray, "l d"]
    scale: float


@dataclasses.dataclass(frozen=True)
class Head:
    """One head in one window: its problem, its form, and why some of its adapters have no gradient.

    Where no adapter has a gradient the problem carries a zero one, for its norms' sake.
    """

    problem: LoRAProblem
    form: str  # "projected", "rotary" or "recorded"
    adapted: tuple[str, ...]  # the adapters with a gradient
    without: dict[str, str]  # those without, and why
    update: dict[str, float]  # max norm of what each adds to its projection, before any rotation
    frozen: Scores  # what meets without the adapter of this layer
    scores: Scores  # what meets in the model
    strength: float | None  # what dl/dO is multiplied by in the target; None for the stand-in
    columns: np.ndarray  # the order in which query and key hold the coordinates of the head


def check_rebuilt(layer: Layer, head: int) -> None:
    """Holds softmax(scaling Q K^T, masked) V against the model's own output of the head.

    layer: of a survey, with the model's output. Raises Refused where they differ, or the model's
    cannot be known.
    """
    if layer.special:
        raise Refused(f"it {layer.special}")
    if layer.mask is None:
        raise Refused("its mask hides more than a band, or adds positions to the scores")
    if layer.output is None:
        raise Refused("no output projection under a known name, so its output cannot be checked")
    q, k, v = _meet(layer, head)
    width = v.shape[1]
    expected = (len(q), layer.heads * width)
    if layer.output.shape != expected:
        raise Refused(f"its output has shape {layer.output.shape}, expected {expected}")
    own = layer.output[:, head * width : (head + 1) * width]
    gap = frobenius_error(_output(q, k, v, layer.scaling, layer.mask), own)
    # "not <=", so that NaN is refused too.
    if not gap <= CLOSE:
        away = f"{gap:.1g} away from the model's own output"
        raise Refused(f"attention rebuilt from its Q, K, V is {away}")


def _meet(layer: Layer, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    group = layer.group(head)
    return layer.query[head], layer.key[group], layer.value[group]


def make_head(
    layer: Layer,
    projections: Mapping[str, Projection],
    head: int,
    *,
    inputs: Inputs | None = None,
    response: float = 1.0,
    strength: float | None = None,
    seed: int = 0,
) -> Head:
    """The problem of one head in one window.

    With a residual dl/dO, target = output - strength dl/dO: the gradient is `strength` times that of
    the model's loss. The strength decides how much an error of the output counts: where it is None
    it is such that an error of a share e of the output changes the residual by the share e response,
    both root mean squares. Without a residual the target is a stand-in: the output of the frozen
    head, plus Gaussian noise (of `seed`) of a tenth of its root mean square.
    Raises Refused for a mask that no problem has, and where a value is not X W_V.
    """
    if layer.mask is None or (layer.mask.window and not layer.mask.causal):
        raise Refused("its queries see a window of keys on both sides, which no problem here has")
    inputs = inputs or Inputs()
    recorded = dict[str, np.ndarray](zip(NAMES, _meet(layer, head), strict=True))
    built = _build(layer, projections, head, recorded, inputs)
    output = _output(*_meet(layer, head), layer.scaling, layer.mask)
    beta = layer.scaling * built.factor
    frozen = Scores(built.frozen("query"), built.frozen("key"), beta)
    if layer.residual:
        strength = strength or _strength(output, layer.residual[head], response)
        target = output - strength * layer.residual[head]
    else:
        values = built.parts["value"].x @ built.parts["value"].w
        target = _stand_in(_output(frozen.query, frozen.key, values, beta, layer.mask), seed)
    adapters, scale = _adapters(built.parts)
    return Head(
        _problem(built, adapters, (scale, beta), target, inputs, layer.mask),
        built.form,
        tuple(adapters),
        built.without,
        built.update,
        frozen,
        Scores(recorded["query"], recorded["key"], layer.scaling),
        strength,
        built.columns,
    )


class _Built(NamedTuple):
    """A head's projections, and what stands between them and the scores."""

    parts: dict[str, Part]
    form: str
    factor: float  # on the scores
    rotary: Rotary | None
    without: dict[str, str]
    update: dict[str, float]

    @property
    def columns(self) -> np.ndarray:
        """The order of the coordinates of queries and keys."""
        if self.rotary is not None:
            return self.rotary.columns
        return np.arange(self.parts["query"].w.shape[1])

    def frozen(self, name: str) -> Float[np.ndarray, "l d"]:
        """Queries or keys without their adapter, turned."""
        rows = self.parts[name].x @ self.parts[name].w
        return rows if self.rotary is None else turn(rows, self.rotary.angles).astype(np.float32)


def _build(
    layer: Layer,
    projections: Mapping[str, Projection],
    head: int,
    recorded: dict[str, np.ndarray],
    inputs: Inputs,
) -> _Built:
    parts = {}
    for n in NAMES:
        place = head if n == "query" else layer.group(head)
        parts[n] = take_part(projections[n], layer.x[n], place, recorded[n].shape[1], inputs)
    if not frobenius_error(parts["value"].rows(), recorded["value"]) <= CLOSE:
        raise Refused("its values are not a projection of its input")
    update = {n: float(abs(p.added()).max()) for n, p in parts.items() if p.adapter is not None}
    form, factor, rotary = _form(parts, recorded)
    without = {}
    if rotary is not None:
        parts |= {n: parts[n].reordered(rotary.columns) for n in ("query", "key")}
    if form == "recorded":
        without = {n: RECORDED for n in ("query", "key") if parts[n].adapter is not None}
        for n in ("query", "key"):
            eye = np.eye(recorded[n].shape[1], dtype=np.float32)
            parts[n] = Part(recorded[n], eye, None, 1.0)
    return _Built(parts, form, factor, rotary, without, update)


def _stand_in(frozen: Float[np.ndarray, "l dv"], seed: int) -> Float[np.ndarray, "l dv"]:
    noise = np.random.default_rng(seed).standard_normal(frozen.shape)
    return frozen + NOISE * _size(frozen) * noise


def _output(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, mask: Mask
) -> Float[np.ndarray, "l dv"]:
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    return np.asarray(attend(q, k, v, jnp.float32(scale), mask.back, mask.ahead))


def _size(rows: np.ndarray) -> float:
    return float(np.sqrt(np.mean(rows.astype(np.float64) ** 2)))


def _strength(output: np.ndarray, residual: np.ndarray, response: float) -> float:
    size = _size(residual)
    if not size > 0:
        raise Refused("the loss has no gradient for its output")
    return _size(output) / (max(response, 1e-3) * size)


def _form(
    parts: Mapping[str, Part], recorded: Mapping[str, np.ndarray]
) -> tuple[str, float, Rotary | None]:
    """(form, what the factors on Q and K are in all, the rotation)."""
    query, key = parts["query"].rows(), parts["key"].rows()
    # the least-squares c
    factor = float((query * recorded["query"]).sum() / max(float((query**2).sum()), 1e-30))
    queries = frobenius_error(factor * query, recorded["query"])
    if factor > 0 and queries <= CLOSE and frobenius_error(key, recorded["key"]) <= CLOSE:
        return "projected", factor, None
    rotary = find_rotary((query, recorded["query"]), (key, recorded["key"]), close=CLOSE)
    if rotary is not None:
        return "rotary", rotary.query_factor * rotary.key_factor, rotary
    return "recorded", 1.0, None


def _adapters(parts: Mapping[str, Part]) -> tuple[dict[str, Adapter], float]:
    """The adapters under one scale, as a problem has it: what differs goes into a."""
    held = {n: p for n, p in parts.items() if p.adapter is not None}
    scale = next((p.scale for p in held.values()), 1.0) or 1.0
    out = {}
    for n, p in held.items():
        assert p.adapter is not None
        out[n] = Adapter(p.adapter.a * (p.scale / scale), p.adapter.b)
    return out, scale


def _problem(
    built: _Built,
    adapters: Mapping[str, Adapter],
    scalars: tuple[float, float],
    target: np.ndarray,
    inputs: Inputs,
    mask: Mask,
) -> LoRAProblem:
    """The problem in float32. scalars: (scale, beta)."""
    parts = built.parts
    # A problem needs an adapter: one of zeros where the head has none.
    d_model, width = parts["value"].w.shape
    adapters = adapters or {"value": Adapter(np.zeros((1, width)), np.zeros((d_model, 1)))}

    def array(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.float32)

    return LoRAProblem(
        inputs.device(parts["query"].x),
        inputs.device(parts["key"].x),
        inputs.device(parts["value"].x),
        array(target),
        weights=AttentionWeights(*(array(parts[n].w) for n in NAMES)),
        adapters={n: Adapter(array(half.a), array(half.b)) for n, half in adapters.items()},
        scale=array(scalars[0]),
        beta=array(scalars[1]),
        rotations=None if built.rotary is None else array(built.rotary.angles),
        causal=mask.causal,
        window=None if mask.back is None else mask.back + 1,
    )
