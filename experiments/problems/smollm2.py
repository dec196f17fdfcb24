"""Heads of a decoder as LoRA problems: SmolLM2-135M on one text, causal, with rotary positions and with
what the next-token loss says of each head.

What the file holds, its licences and how to make it again: experiments/data/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_limits as ll
from experiments.problems import minilm
from lora_limits.instruments.comparing import softmax
from lora_limits.problem import NAMES, project, projections
from lora_limits.rotary import rotary_angles

PATH = minilm.PATH.with_name("smollm2_heads.npz")
WIDTH = 64
BLOCK = 512  # queries whose scores are held at once


def heads(path: Path = PATH) -> tuple[tuple[int, int], ...]:
    """The (layer, head) there are, layer by layer, each layer's from tame to wild."""
    return minilm.heads(path)


def tokens(path: Path = PATH) -> int:
    """How many tokens the text has."""
    return minilm.tokens(path)


def score_range(layer: int, head: int, *, path: Path = PATH) -> float:
    """max |beta q_i . (k_j - mean k)| over j <= i of all tokens, rotated, by the unrounded model."""
    return minilm.score_range(layer, head, path=path)


def _decoded(name: str, length: int, path: Path) -> np.ndarray:
    """The first rows of an array, from 8 bits or half precision; float64."""
    arrays = minilm.load(path)
    x = arrays[name][:length].astype(np.float64)
    if f"{name}_rows" in arrays:
        x = x * arrays[f"{name}_rows"][:length] * arrays[f"{name}_columns"]
    return x


def inputs(
    layer: int, head: int, *, length: int, path: Path = PATH
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """X (length, 576) and each projection's W (576, 64), float64.

    Key and value are those of the key head that the head reads.
    Raises ValueError for a (layer, head) that the file lacks, and for a length outside 1 to its
    tokens.
    """
    place = minilm.place(layer, head, path)
    most = tokens(path)
    if not 1 <= length <= most:
        raise ValueError(f"length: got {length}, expected 1 to {most}")
    arrays = minilm.load(path)
    group = arrays[f"layer{layer}_key_heads"][place]
    sources = {"query": head, "key": group, "value": group}
    weights = {n: arrays[f"layer{layer}_{n}{m}"].astype(np.float64) for n, m in sources.items()}
    return _decoded(f"layer{layer}_x", length, path), weights


def problem(
    layer: int,
    head: int,
    *,
    adapt: Sequence[str] = NAMES,
    rank: int = 4,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    size: float = 1.0,
    path: Path = PATH,
) -> ll.LoRAProblem:
    """The causal LoRA problem of one head: Gaussian adapters, and the loss's own gradient as residual.

    The target is output - dO: of the frozen head's output, and of the gradient dO of the next-token
    loss in that output, scaled to `size` times the output's root mean square; gradients are linear
    in it, and as it is it would be lost beside the output in float32. Adapters as `minilm.problem`
    makes them. length: of the text's beginning, all of it by default; dO is of the whole text's
    loss.
    Raises ValueError as `inputs` does.
    """
    length = tokens(path) if length is None else length
    x, weights = inputs(layer, head, length=length, path=path)
    random = np.random.default_rng([seed, layer, head])
    adapters = {name: minilm.adapter(random, weight, rank) for name, weight in weights.items()}
    base = float(minilm.load(path)["rotary_base"])
    angles = rotary_angles(length, WIDTH, base=base, dtype=np.float64)
    output = _output(x, weights, angles)
    cotangent = _decoded(f"layer{layer}_cotangent{head}", length, path)
    shrunk = size * np.sqrt(np.mean(output**2) / np.mean(cotangent**2))

    def array(value: np.ndarray) -> jax.Array:
        return jnp.asarray(value, dtype)

    return ll.LoRAProblem(
        array(x),
        array(x),
        array(x),
        array(output - shrunk * cotangent),
        weights=ll.AttentionWeights(**{name: array(weight) for name, weight in weights.items()}),
        adapters={name: ll.Adapter(*map(array, adapters[name])) for name in NAMES if name in adapt},
        scale=1.0,
        beta=WIDTH**-0.5,
        rotations=array(angles),
        causal=True,
    )


def as_they_meet(problem: ll.LoRAProblem, *, rotated: bool = True) -> ll.LoRAProblem:
    """The problem of the rows Q and K that meet in the scores, under W = I, without a mask.

    Its scores are the problem's own where rotated, and of the same rows before rotation otherwise.
    """
    q, k, _ = projections(problem)
    if not rotated:
        q, k = (project(problem, n, getattr(problem, f"x_{n}")) for n in ("query", "key"))
    one = jnp.eye(q.shape[1], dtype=q.dtype)
    weights = ll.AttentionWeights(query=one, key=one, value=problem.weights.value)
    zero = jnp.zeros((1, one.shape[0]), q.dtype)
    # A problem needs an adapter.
    adapters = {"query": ll.Adapter(zero, zero.T)} | {
        n: a for n, a in problem.adapters.items() if n == "value"
    }
    return ll.LoRAProblem(
        q,
        k,
        problem.x_value,
        problem.target,
        weights=weights,
        adapters=adapters,
        scale=problem.scale,
        beta=problem.beta,
    )


def _output(x: np.ndarray, weights: dict[str, np.ndarray], angles: np.ndarray) -> np.ndarray:
    """What the frozen head puts out, some queries at a time, none reading a key after it."""
    q, k, v = (x @ weights[name] for name in NAMES)
    q, k = (_turned(y, angles) for y in (q, k))
    out = []
    for first in range(0, len(q), BLOCK):
        last = min(first + BLOCK, len(q))
        scores = q[first:last] @ k[:last].T * WIDTH**-0.5
        later = np.arange(last)[None] > np.arange(first, last)[:, None]
        out.append(softmax(np.where(later, -np.inf, scores)) @ v[:last])
    return np.concatenate(out)


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rows turned by their angles as `lora_limits.rotary.rotate` does it, in double precision."""
    first, second = np.split(x, 2, axis=1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.hstack([first * cos - second * sin, second * cos + first * sin])
