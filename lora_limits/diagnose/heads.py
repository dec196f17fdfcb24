"""From a recording to a LoRAProblem a head, after a check that it rebuilds the model's own output.

Two forms. `projected`: Q = c (X W_Q + bias) with the adapter in, so that the problem has the
model's own X, weights and adapters (c, a factor some models put on the query, goes into beta).
`rotated`: positions or a normalisation stand between the projections and the scores (rotary
models), which no single W expresses; the problem then starts from the recorded Q and K with
identity weights, and only the value adapter has a gradient. Biases are a column of ones in X; the
key's cancels in the softmax and is kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_limits.diagnose.activations import NAMES, Layer
from lora_limits.diagnose.adapters import Projection
from lora_limits.instruments.comparing import frobenius_error, softmax
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem

CLOSE = 1e-3  # relative, of what is rebuilt in float32 against what the model computed
ROTATED = "positions or a normalisation stand between this projection and the scores"
NOISE = 0.1  # of the target, beside the root mean square of the head's output


class Refused(ValueError):
    """A head that cannot be analysed; the message says why in one line."""


@dataclasses.dataclass(frozen=True)
class Head:
    """One head in one window: its problem, its form, and why some of its adapters have no gradient.

    Where no adapter has a gradient the problem carries a zero one, for its norms' sake.
    """

    problem: LoRAProblem
    form: str  # "projected" or "rotated"
    causal: bool
    adapted: tuple[str, ...]  # the adapters with a gradient
    without: dict[str, str]  # those without, and why
    update: dict[str, float]  # max norm of what each adds to its projection, before any rotation


def counts(layer: Layer) -> tuple[int, int]:
    """(heads, key-value heads) of a recorded layer. Raises Refused where nothing was recorded."""
    if layer.query is None or layer.key is None or layer.value is None:
        raise Refused("its attention does not go through transformers' attention interface")
    return len(layer.query), len(layer.key)


def check_rebuilt(layer: Layer, head: int) -> None:
    """Holds softmax(scaling Q K^T, masked) V against the model's own output of the head.

    Raises Refused where they differ, or the model's cannot be known.
    """
    heads, groups = counts(layer)
    if layer.output is None or layer.query is None or layer.key is None or layer.value is None:
        raise Refused("no output projection under a known name, so its output cannot be checked")
    if layer.mask == "other":
        raise Refused("its mask is neither full nor causal, or adds positions to the scores")
    q = layer.query[head]
    k = layer.key[head * groups // heads]
    v = layer.value[head * groups // heads]
    scores = layer.scaling * q.astype(np.float64) @ k.T
    if layer.mask == "causal":
        scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
    width = v.shape[1]
    expected = (len(q), heads * width)
    if layer.output.shape != expected:
        raise Refused(f"its output has shape {layer.output.shape}, expected {expected}")
    own = layer.output[:, head * width : (head + 1) * width]
    gap = frobenius_error(softmax(scores) @ v, own)
    # "not <=", so that NaN is refused too.
    if not gap <= CLOSE:
        away = f"{gap:.1g} away from the model's own output"
        raise Refused(f"attention rebuilt from its Q, K, V is {away}")


def _columns(
    p: Projection, x: Float[np.ndarray, "l d_model"], place: int, width: int
) -> dict[str, Any]:
    """X, W and the adapter of one head of a projection, the bias as a column of ones.

    place: of the head among those of the projection. rows: what the projection puts out, adapter
    in; update: the max norm of what the adapter adds.
    """
    own = slice(place * width, (place + 1) * width)
    w = p.weight[:, own]
    b = p.b
    # The bias becomes a last row of W, which the adapter leaves alone.
    if p.bias is not None:
        x = np.hstack([x, np.ones((len(x), 1), x.dtype)])
        w = np.vstack([w, p.bias[None, own]])
        b = None if b is None else np.vstack([b, np.zeros((1, b.shape[1]), b.dtype)])
    adapter = None if b is None or p.a is None else Adapter(a=p.a[:, own], b=b)
    update = np.zeros((1, width)) if adapter is None else p.scale * (x @ adapter.b) @ adapter.a
    return {
        "x": x,
        "w": w,
        "adapter": adapter,
        "rows": x @ w + update,
        "update": float(np.abs(update).max()),
    }


def make_head(
    layer: Layer, projections: dict[str, Projection], head: int, *, seed: int = 0
) -> Head:
    """The problem of one head in one window. seed: of the target's noise.

    target = output of the frozen head (value adapter off; in the projected form all adapters off;
    no mask) + Gaussian noise of a tenth of its root mean square. The problem is the paper's,
    without a mask, whatever the model's own.
    Raises Refused where the recording does not rebuild the model's output, where a value is not
    X W_V, and for adapters of different scales.
    """
    check_rebuilt(layer, head)
    heads, groups = counts(layer)
    # Query heads share key heads in runs of heads / groups.
    group = head * groups // heads
    recorded = {"query": layer.query[head], "key": layer.key[group], "value": layer.value[group]}  # type: ignore
    parts = {}
    for n in NAMES:
        place = head if n == "query" else group
        parts[n] = _columns(projections[n], layer.x[n], place, recorded[n].shape[1])
    if not frobenius_error(parts["value"]["rows"], recorded["value"]) <= CLOSE:
        raise Refused("its values are not a projection of its input")
    update = {n: p["update"] for n, p in parts.items() if p["adapter"] is not None}
    factor, form = _form(parts, recorded)
    without = {}
    if form == "rotated":
        without = {n: ROTATED for n in ("query", "key") if parts[n]["adapter"] is not None}
        for n in ("query", "key"):
            parts[n] = {"x": recorded[n], "w": np.eye(recorded[n].shape[1]), "adapter": None}
    adapters = {n: p["adapter"] for n, p in parts.items() if p["adapter"] is not None}
    scales = {n: projections[n].scale for n in adapters}
    # A LoRAProblem has one scale for all of its adapters.
    if len(set(scales.values())) > 1:
        raise Refused(f"its adapters have different scales {scales}, expected one")
    scale = next(iter(scales.values()), 1.0)
    problem = _problem(parts, adapters, scale, layer.scaling * factor, seed)
    return Head(problem, form, layer.mask == "causal", tuple(adapters), without, update)


def _form(parts: dict[str, Any], recorded: dict[str, np.ndarray]) -> tuple[float, str]:
    """(c, "projected") where Q = c X W_Q and K = X W_K, adapters in; else (1, "rotated")."""
    rows = parts["query"]["rows"]
    # the least-squares c
    factor = float((rows * recorded["query"]).sum() / max(float((rows**2).sum()), 1e-30))
    queries = frobenius_error(factor * rows, recorded["query"])
    keys = frobenius_error(parts["key"]["rows"], recorded["key"])
    if factor > 0 and queries <= CLOSE and keys <= CLOSE:
        return factor, "projected"
    return 1.0, "rotated"


def _problem(
    parts: dict[str, Any], adapters: dict[str, Adapter], scale: float, beta: float, seed: int
) -> LoRAProblem:
    """The problem in float32, its target the frozen head's output plus noise."""
    q, k, v = (p["x"] @ p["w"] for p in parts.values())
    output = softmax(beta * q.astype(np.float64) @ k.T) @ v
    noise = np.random.default_rng(seed).standard_normal(output.shape)
    target = output + NOISE * np.sqrt(np.mean(output**2)) * noise
    # A problem needs an adapter: one of zeros where the head has none.
    d_model, width = parts["value"]["w"].shape
    adapters = adapters or {"value": Adapter(np.zeros((1, width)), np.zeros((d_model, 1)))}

    def array(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.float32)

    return LoRAProblem(
        array(parts["query"]["x"]),
        array(parts["key"]["x"]),
        array(parts["value"]["x"]),
        array(target),
        weights=AttentionWeights(**{n: array(parts[n]["w"]) for n in NAMES}),
        adapters={n: Adapter(array(half.a), array(half.b)) for n, half in adapters.items()},
        scale=array(scale),
        beta=array(beta),
    )
