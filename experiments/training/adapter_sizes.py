"""How large adapters are after training: what the sizes that a sweep sets are held against."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from experiments.training import bases, tasks
from lora_limits.linalg import AnyArray
from lora_limits.nn.lora import LoRA
from lora_limits.training import loop
from lora_limits.training.loop import Recipe

TASK = "digits"
LENGTH = 64
PRETRAINING = 300
SIZES = {"d_model": 32, "heads": 4, "width": 8, "layers": 1}


def trained(lora: LoRA, *, steps: int, rate: float, seed: int, cache: str | Path) -> dict:
    """Query adapters of a small classifier after exact training, Adam, all three projections adapted.

    "size": the root of rms(A) rms(B), the size of equal entries with the same product. "share":
    |s B A| / |W*| in Frobenius norm. "before", "after": accuracy on held-out images.
    """
    base = bases.base(TASK, LENGTH, Recipe(PRETRAINING, every=PRETRAINING), **SIZES)
    model = bases.pretrained(base, lora, cache, seed=seed)
    task = tasks.load(TASK, LENGTH, "target")
    history = loop.train(model, task, Recipe(steps, rate=rate, seed=seed, every=steps))
    query = model.blocks[0].attention.query
    a, b, w = (np.asarray(x[...], np.float64) for x in (query.a, query.b, query.kernel))
    return {
        "size": math.sqrt(_rms(a) * _rms(b)),
        "share": float(np.linalg.norm(lora.scale * b @ a) / np.linalg.norm(w)),
        "before": float(history["accuracy"][0]),
        "after": float(history["accuracy"][-1]),
    }


def _rms(x: AnyArray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
