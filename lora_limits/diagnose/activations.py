"""What a real model computes in its attention, taken by hooks: inputs, Q, K, V, mask and output."""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lora_limits.checks import fail

NAMES = ("query", "key", "value")
# (query, key, value) under the names that transformers gives them.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
FUSED = "c_attn"  # one projection for all three, in this order
OUTPUT = ("o_proj", "out_proj", "out_lin", "c_proj", "o", "dense")
RECORDER = "lora_limits_recorder"
FAR = -1e4  # an entry of a mask below this hides its key


@dataclasses.dataclass
class Layer:
    """One attention module: its projections, and what one window of tokens put through them.

    Queries, keys and values are as they meet in the scores, positions applied; keys and values have
    as many heads as the model gives them. The output is the model's own, before its output
    projection. None or empty: not recorded.
    """

    path: str
    projections: dict[str, str]  # paths by name, all the same where they are fused
    fused: bool
    out: str | None  # path of the output projection
    x: dict[str, Float[np.ndarray, "l d_model"]] = dataclasses.field(default_factory=dict)
    query: Float[np.ndarray, "heads l d"] | None = None
    key: Float[np.ndarray, "groups l d"] | None = None
    value: Float[np.ndarray, "groups l dv"] | None = None
    mask: str = "other"  # or "full", or "causal"
    scaling: float = 1.0  # what multiplies the scores
    output: Float[np.ndarray, "l heads_dv"] | None = None


def find_layers(model: Any) -> list[Layer]:
    """The attention modules of a model, in order.

    Raises ValueError where no query, key and value are found.
    """
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        names = next((n for n in SEPARATE if all(c in children for c in n)), None)
        # With q_attn beside it the fused projection is of keys and values only (cross-attention).
        fused = names is None and FUSED in children and "q_attn" not in children
        if names is None and not fused:
            continue
        places = dict(zip(NAMES, names or (FUSED,) * 3, strict=True))
        projections = {n: f"{path}.{c}" for n, c in places.items()}
        found.append(Layer(path, projections, fused, _output(model, path, children)))
    if not found:
        known = " or ".join([*(", ".join(names) for names in SEPARATE), FUSED])
        fail(type(model).__name__, "no attention projections", f"modules named {known}")
    return found


def _output(model: Any, path: str, children: dict[str, Any]) -> str | None:
    """The output projection: a child, or as in BERT the dense layer beside the attention module."""
    inside = next((n for n in OUTPUT if n in children), None)
    if inside:
        return f"{path}.{inside}"
    beside = f"{path.rpartition('.')[0]}.output.dense"
    return beside if any(name == beside for name, _ in model.named_modules()) else None


def record(model: Any, ids: Int[np.ndarray, " l"]) -> list[Layer]:
    """Runs one window of token ids, and returns its attention layers, filled in.

    Twice: once with the model's own eager attention, for its output; once with an attention
    function that hands over what it is given and takes no part in the check. Holds every layer's
    inputs at once: O(layers L d_model).
    """
    import torch

    layers = find_layers(model)
    modules = dict(model.named_modules())
    tokens = torch.as_tensor(ids)[None]
    hooks = [_hook(modules[layer.out], layer) for layer in layers if layer.out]
    try:
        _run(model, tokens, "eager")
    finally:
        for hook in hooks:
            hook.remove()
    by_module = {id(modules[layer.path]): layer for layer in layers}
    hooks = []
    for layer in layers:
        hooks += [_hook(modules[path], layer, name) for name, path in layer.projections.items()]
    try:
        _register(by_module)
        _run(model, tokens, RECORDER)
    finally:
        model.set_attn_implementation("eager")
        for hook in hooks:
            hook.remove()
    return layers


def _run(model: Any, tokens: Any, implementation: str) -> None:
    import torch

    model.set_attn_implementation(implementation)
    with torch.no_grad():
        model(input_ids=tokens)


def _hook(module: Any, layer: Layer, name: str | None = None) -> Any:
    """Keeps what goes into a module: a projection's input or, with no name, the layer's output."""

    def keep(_module, arguments):
        rows = arguments[0][0].float().numpy().copy()
        if name is None:
            layer.output = rows
        else:
            layer.x[name] = rows

    return module.register_forward_pre_hook(keep)


def _register(by_module: dict[int, Layer]) -> None:
    """Puts the recorder into transformers' table of attention functions.

    Masks are made for it as for eager attention.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def recorder(module, query, key, value, attention_mask, scaling=None, **_unused):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = by_module.get(id(module))
        if layer is not None:
            rows = (x[0].float().numpy().copy() for x in (query, key, value))
            layer.query, layer.key, layer.value = rows
            layer.mask = _mask(attention_mask)
            layer.scaling = float(scale)
        # The model goes on with plain softmax attention, so that later layers see what they should.
        groups = query.shape[1] // key.shape[1]
        scores = scale * query @ key.repeat_interleave(groups, 1).mT
        if attention_mask is not None:
            scores = scores + attention_mask
        out = torch.softmax(scores, -1) @ value.repeat_interleave(groups, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(RECORDER, recorder)
    AttentionMaskInterface.register(RECORDER, eager_mask)


def _mask(mask: Any) -> str:
    """ "full": hides nothing; "causal": exactly what comes later; "other": anything else.

    Among the others are windows, padding, and positions added to the scores.
    """
    if mask is None:
        return "full"
    # Additive: 0 where a key is seen, very negative where not, anything else a position.
    rows = mask[0].float().numpy()
    hidden = rows < FAR
    if (rows[~hidden] != 0).any():
        return "other"
    later = np.triu(np.ones(rows.shape[-2:], bool), 1)[None]
    if not hidden.any():
        return "full"
    return "causal" if (hidden == later).all() else "other"
