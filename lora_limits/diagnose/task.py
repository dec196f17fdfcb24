"""The task whose gradient is diagnosed: the loss that a model of this class is trained with."""

# The extra may be absent where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lora_limits.checks import fail
from lora_limits.diagnose.texts import Windows

MASKED = 0.15  # of a window's tokens, in masked language models, as BERT was trained
IGNORED = -100  # the label that the losses of transformers leave out


class Task(NamedTuple):
    """name: what the loss is, in words; None where the model has none. inputs: of one window."""

    name: str | None
    why: str  # where there is no loss
    inputs: Callable[[int], dict[str, Any]]
    tokens: Callable[[int, int], dict[str, Any]]  # the first of a window, without labels


def find_task(model: Any, tokenizer: Any, windows: Windows) -> Task:
    """The task of a model's class, on its windows.

    Next tokens for causal language models, masked tokens for masked ones (15 % of a window, of a
    fixed seed), the labels given for classifiers of sequences; else there is none.
    Raises ValueError for labels that the model has no classes for.
    """
    name, why, inputs = _loss(model, tokenizer, windows)
    return Task(name, why, inputs, lambda n, count: _tokens(windows.ids[n][:count]))


def _loss(
    model: Any, tokenizer: Any, windows: Windows
) -> tuple[str | None, str, Callable[[int], dict[str, Any]]]:
    """The first three fields of a Task."""
    from transformers.models.auto import modeling_auto as auto

    kind = type(model).__name__
    ids = windows.ids
    if kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        if windows.labels is None:
            return None, f"{kind} without --labels", lambda n: _tokens(ids[n])
        classes = [_class(model, label) for label in windows.labels]
        return "classification", "", lambda n: _tokens(ids[n]) | _labels(classes[n])
    if windows.labels is not None:
        fail("--labels", f"a {kind}", "a model for sequence classification")
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "next token", "", lambda n: _tokens(ids[n]) | _labels(ids[n])
    mask = getattr(tokenizer, "mask_token_id", None)
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and mask is not None:
        special = set(tokenizer.all_special_ids)
        return "masked tokens", "", lambda n: _masked(ids[n], mask, special, seed=n)
    return None, f"{kind} has no loss", lambda n: _tokens(ids[n])


def _tokens(ids: Int[np.ndarray, " l"]) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.as_tensor(ids)[None]}


def _labels(labels: Any) -> dict[str, Any]:
    import torch

    return {"labels": torch.as_tensor(labels)[None]}


def _masked(
    ids: Int[np.ndarray, " l"], mask: int, special: set[int], *, seed: int
) -> dict[str, Any]:
    """A window with some of its tokens masked, to be found again; at least one of them."""
    random = np.random.default_rng(seed)
    free = np.flatnonzero(~np.isin(ids, list(special)))
    count = max(1, round(MASKED * len(free)))
    hidden = random.choice(free, count, replace=False)
    labels = np.full_like(ids, IGNORED)
    labels[hidden] = ids[hidden]
    seen = ids.copy()
    seen[hidden] = mask
    return _tokens(seen) | _labels(labels)


def _class(model: Any, label: str) -> int:
    """The number of a class, given by its number or its name in the model's config."""
    names = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    number = names.get(label, int(label) if label.isascii() and label.isdigit() else -1)
    if not 0 <= number < model.config.num_labels:
        fail(
            "--labels", repr(label), f"0 to {model.config.num_labels - 1}, or one of {list(names)}"
        )
    return number
