"""The loss of a pass and its backward pass, without all logits of a language model at once.

Logits take L x vocabulary numbers, often more than all else: 0.4 GB at 2048 tokens and 49,152 words,
several times over. Where a model does nothing but project its last hidden rows, its loss is a sum
over pieces of the text, each with its own logits.
"""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PIECE = 256  # tokens whose logits are held at once
FEW = 4  # tokens on which the model's own logits are held against its projection's

Inputs = Mapping[str, Any]


def splits(model: Any, inputs: Inputs) -> bool:
    """Whether the loss is one of next tokens that may be taken in pieces."""
    import torch

    labels, ids = inputs.get("labels"), inputs["input_ids"]
    next_token = labels is not None and torch.equal(labels, ids)
    return next_token and _only_projects(model, ids[:, :FEW])


def loss_and_back(model: Any, inputs: Inputs, in_pieces: bool) -> tuple[float, Callable[[], None]]:
    """(the loss, its backward pass) of one pass.

    Without labels what is differentiated is the mean square of what the model puts out, which
    stands for no task.
    """
    if in_pieces:
        return _in_pieces(model, inputs["input_ids"])
    out = model(**inputs)
    loss = out.loss if "labels" in inputs else out[0].square().mean()
    return float(loss.detach()), loss.backward


@contextmanager
def _before_the_head(model: Any, kept: dict[str, Any]) -> Iterator[None]:
    """Keeps what goes into the last projection, which then sees the first token alone."""

    def keep(_module: Any, arguments: Any) -> Any:
        kept["hidden"] = arguments[0]
        return (arguments[0][:, :1],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _only_projects(model: Any, ids: Any) -> bool:
    """Whether the logits are the last projection of hidden rows, neither capped nor scaled."""
    import torch

    head = model.get_output_embeddings()
    if head is None:
        return False
    kept: dict[str, Any] = {}
    with torch.no_grad():
        with _before_the_head(model, kept):
            own = model(input_ids=ids).logits
        hidden = kept.get("hidden")
        if hidden is None or hidden.shape[:2] != ids.shape:
            return False
        return torch.equal(own, head(hidden[:, :1]))


def _in_pieces(model: Any, ids: Any) -> tuple[float, Callable[[], None]]:
    """The mean loss of the next token, PIECE tokens at a time."""
    import torch

    kept: dict[str, Any] = {}
    with _before_the_head(model, kept):
        model(input_ids=ids)
    head = model.get_output_embeddings()
    hidden = kept["hidden"]
    rows = hidden.detach().requires_grad_()
    count = ids.shape[1] - 1
    total = 0.0
    for start in range(0, count, PIECE):
        end = min(start + PIECE, count)
        logits = head(rows[0, start:end]).float()
        told = torch.nn.functional.cross_entropy(
            logits, ids[0, start + 1 : end + 1], reduction="sum"
        )
        (told / count).backward()
        total += float(told.detach()) / count
    return total, lambda: hidden.backward(rows.grad)
