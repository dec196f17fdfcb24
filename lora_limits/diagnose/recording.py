"""One window through the model, forward and back: what every attention layer saw and was told.

The model runs with an attention function of its own in transformers' table, which hands over what
it is given: queries, keys and values as they meet in the scores, the mask, and in the backward pass
dl/dO, the gradient of the loss for the head's output. The weights get no gradient, and each block
is computed again in the backward pass instead of being kept: memory for one block, not for all.
"""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from lora_limits.checks import fail
from lora_limits.diagnose import losses
from lora_limits.diagnose.layers import Layer, Mask, Place, block_of, read_mask
from lora_limits.diagnose.losses import Inputs

RECORDER = "lora_limits_recorder"
FAR = -1e4  # an entry of a mask below this hides its key
# Arguments of transformers' attention functions that change the scores, in words.
SPECIAL = {"softcap": "caps its scores", "s_aux": "has attention sinks"}

Taken = Callable[[Place, Layer], None]
Residual = Callable[[Place, dict[int, np.ndarray]], None]


class Recorder:
    """The attention function, and the hooks beside it, of one pass.

    taken: called with each layer; residual: with dl/dO by head, in the backward pass. chosen: the
    heads that are kept of a layer, None for all. noise: added to every output, in shares of its
    root mean square, for what an error in the attention does to dl/dO. skip: every token attends to
    itself alone, for what a pass takes without attention.
    """

    def __init__(
        self,
        places: Sequence[Place],
        taken: Taken | None = None,
        residual: Residual | None = None,
        *,
        chosen: Mapping[int, Sequence[int]] | None = None,
        noise: float = 0.0,
        skip: bool = False,
    ) -> None:
        self.places = places
        self.taken, self.residual = taken, residual
        self.chosen, self.noise, self.skip = chosen, noise, skip
        self.open = True  # closed before a backward pass, in which blocks run again
        self.ran: Counter[int] = Counter()  # how often each module ran
        self._by_module: dict[int, Place] = {}
        self._x: dict[int, dict[str, tuple[Any, np.ndarray]]] = {}
        self._masks: list[tuple[Any, Mask | None]] = []

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """The model with the recorder as its attention, for a while."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        modules = dict(model.named_modules())
        self._by_module = {id(modules[place.path]): place for place in self.places}
        AttentionInterface.register(RECORDER, self._attend)
        # Masks are made for it as for eager attention.
        AttentionMaskInterface.register(RECORDER, eager_mask)
        with ExitStack() as hooks:
            for place in self.places:
                for name, path in place.projections.items():
                    keep = functools.partial(self._keep, place, name)
                    handle = modules[path].register_forward_pre_hook(keep)
                    hooks.callback(handle.remove)
            model.set_attn_implementation(RECORDER)
            hooks.callback(model.set_attn_implementation, "eager")
            yield

    def _keep(self, place: Place, name: str, _module: Any, arguments: Any) -> None:
        """Keeps the input of a projection, once where projections share it."""
        if not self.open:
            return
        self.ran[place.number] += name == "query"
        if self.taken is None or self._unwanted(place):
            return
        held = self._x.setdefault(place.number, {})
        tensor = arguments[0]
        copies = (copy for other, copy in held.values() if other is tensor)
        copy = next(copies, None)
        held[name] = (tensor, _rows(tensor[0]) if copy is None else copy)

    def _unwanted(self, place: Place) -> bool:
        return self.chosen is not None and not self.chosen.get(place.number)

    def _attend(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Any, None]:
        """Softmax attention as transformers calls it, so that later layers see what they should."""
        import torch

        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        shared = query.shape[1] // key.shape[1]
        out = value.repeat_interleave(shared, 1)
        mask = self._mask(attention_mask, query.shape[2])
        # As transformers does: a causal order costs half when it is known to be one.
        causal = mask == Mask(None, 0)
        if not self.skip:
            out = torch.nn.functional.scaled_dot_product_attention(
                query,
                key.repeat_interleave(shared, 1),
                out,
                attn_mask=None if causal else attention_mask,
                is_causal=causal,
                scale=scale,
            )
        place = self._by_module.get(id(module))
        if place is not None and self.noise:
            out = out + self.noise * _noise_like(out, place.number)
        if place is not None and self.open and not self._unwanted(place):
            self._take(place, (query, key, value), mask, scale, options)
            self._listen(place, out)
        return out.transpose(1, 2).contiguous(), None

    def _take(
        self,
        place: Place,
        tokens: tuple[Any, Any, Any],
        mask: Mask | None,
        scale: float,
        options: Any,
    ) -> None:
        if self.taken is None:
            return
        query, key, value = (x[0].detach() for x in tokens)
        heads, groups = len(query), len(key)
        chosen = range(heads) if self.chosen is None else self.chosen[place.number]
        theirs = sorted({h * groups // heads for h in chosen})
        found = [f"{why} ({n})" for n, why in SPECIAL.items() if options.get(n) is not None]
        held = self._x.pop(place.number, {})
        layer = Layer(
            heads=heads,
            groups=groups,
            scaling=scale,
            mask=mask,
            x={name: copy for name, (_, copy) in held.items()},
            query={h: _rows(query[h]) for h in chosen},
            key={g: _rows(key[g]) for g in theirs},
            value={g: _rows(value[g]) for g in theirs},
            special=" and ".join(found) or None,
        )
        self.taken(place, layer)

    def _listen(self, place: Place, out: Any) -> None:
        """Hands over dl/dO as soon as the backward pass has it."""
        if self.residual is None or not out.requires_grad:
            return
        tell = self.residual
        heads = out.shape[1]
        chosen = range(heads) if self.chosen is None else self.chosen[place.number]

        def hear(grad: Any) -> None:
            tell(place, {h: _rows(grad[0, h]) for h in chosen})

        out.register_hook(hear)

    def _mask(self, mask: Any, tokens: int) -> Mask | None:
        """What an additive mask leaves visible. Layers share their masks, so each is read once."""
        if mask is None:
            return Mask()
        for known, read in self._masks:
            if known is mask:
                return read
        # 0 where a key is seen, very negative where not, anything else a position.
        rows = mask[0].float().numpy()
        hidden = rows < FAR
        plain = len(rows) == 1 and not ((rows != 0) & ~hidden).any()
        read = read_mask(hidden[0][:, -tokens:]) if plain else None
        self._masks.append((mask, read))
        return read


def _rows(tensor: Any) -> np.ndarray:
    """A copy, in float32."""
    return tensor.detach().float().numpy().copy()


def _noise_like(out: Any, seed: int) -> Any:
    """Gaussian noise of the root mean square of each head, the same when a block runs again."""
    import torch

    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(out.shape, generator=random)
    return noise * out.detach().square().mean((-1, -2), keepdim=True).sqrt()


def forward(model: Any, inputs: Inputs, recorder: Recorder) -> None:
    """One pass without a loss."""
    import torch

    with recorder.on(model), torch.no_grad():
        model(**inputs)


def forward_and_back(model: Any, inputs: Inputs, recorder: Recorder) -> float:
    """One pass and its backward pass; the loss. Weights get no gradient.

    Raises ValueError for a loss that is not finite.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    in_pieces = losses.splits(model, inputs)
    # The graph starts at the embeddings, since no weight is in it.
    start = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, out: out.requires_grad_()
    )
    try:
        with recorder.on(model), _blocks_run_again(model, recorder.places):
            loss, back = losses.loss_and_back(model, inputs, in_pieces)
            recorder.open = False
            if not math.isfinite(loss):
                fail(type(model).__name__, f"a loss of {loss}", "a finite one")
            back()
    finally:
        start.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
    return loss


@contextmanager
def _blocks_run_again(model: Any, places: Sequence[Place]) -> Iterator[None]:
    """Blocks that keep nothing for the backward pass but their input."""
    from torch.utils.checkpoint import checkpoint

    modules = dict(model.named_modules())
    paths = {block_of(model, place) for place in places} - {None}
    blocks = [modules[path] for path in sorted(p for p in paths if p)]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def own_outputs(model: Any, places: Sequence[Place], inputs: Inputs) -> dict[int, np.ndarray]:
    """What goes into each output projection, by the model's own eager attention."""
    import torch

    modules = dict(model.named_modules())
    kept: dict[int, np.ndarray] = {}

    def keep(number: int, _module: Any, arguments: Any) -> None:
        kept[number] = _rows(arguments[0][0])

    with ExitStack() as hooks:
        for place in places:
            if place.out:
                hook = functools.partial(keep, place.number)
                hooks.callback(modules[place.out].register_forward_pre_hook(hook).remove)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model(**inputs)
    return kept


def survey(
    model: Any, places: Sequence[Place], inputs: Inputs
) -> tuple[dict[int, Layer], Counter[int]]:
    """Every layer on a short window, with the model's own output; and how often each module ran."""
    layers: dict[int, Layer] = {}

    def taken(place: Place, layer: Layer) -> None:
        layers[place.number] = layer

    outputs = own_outputs(model, places, inputs)
    recorder = Recorder(places, taken)
    forward(model, inputs, recorder)
    for number, layer in layers.items():
        layer.output = outputs.get(number)
    return layers, recorder.ran
