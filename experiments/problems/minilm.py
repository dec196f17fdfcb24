"""Real attention heads as LoRA problems: 24 heads of all-MiniLM-L6-v2 on 512 tokens of CPython's
documentation.

What the file holds, its licences and how to make it again: experiments/data/README.md.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import lora_limits as ll
from lora_limits.instruments.comparing import softmax
from lora_limits.problem import NAMES

PATH = Path(__file__).parents[1] / "data" / "minilm_heads.npz"
ASIDE = PATH.with_name("minilm_aside.npz")  # other heads, on 2048 tokens, that nothing was tuned on
TOKENS, WIDTH = 512, 32
# The size of the random update beside its weight, and of the target's noise beside the head's
# output.
UPDATE, NOISE = 0.02, 0.1


@functools.cache
def load(path: Path = PATH) -> dict[str, np.ndarray]:
    """Every array of the file by its name, read once and read-only."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


@functools.cache
def fingerprint(path: Path = PATH) -> dict[str, str]:
    """{"heads": 16 hexadecimal digits of SHA-256 over the file}."""
    return {"heads": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def heads(path: Path = PATH) -> tuple[tuple[int, int], ...]:
    """The (layer, head) there are, layer by layer, each layer's from tame to wild (by centred score
    range).
    """
    arrays = load(path)
    return tuple(
        (int(layer), int(head))
        for layer in arrays["layers"]
        for head in arrays[f"layer{layer}_heads"]
    )


def tokens(path: Path = PATH) -> int:
    """How many tokens the inputs have."""
    return len(load(path)["tokens"])


def score_range(layer: int, head: int, *, path: Path = PATH) -> float:
    """max |beta q . (k - mean k)| of a head over its first 512 tokens, by the unrounded model.
    Raises as `problem`.
    """
    return float(load(path)[f"layer{layer}_score_range"][place(layer, head, path)])


def inputs(
    layer: int, head: int, *, length: int = TOKENS, path: Path = PATH
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """X (length, 385), its last column ones, and each projection's W (385, 32), its last row the
    bias; float64.

    path: the embedded file, or a longer one made as its README says.
    Raises ValueError for a (layer, head) that the file lacks, and for a length outside 1 to its
    tokens.
    """
    own = place(layer, head, path)
    arrays = load(path)
    most = tokens(path)
    if not 1 <= length <= most:
        raise ValueError(f"length: got {length}, expected 1 to {most}")
    x = arrays[f"layer{layer}_x"][:length].astype(np.float64)
    weights = {
        name: np.vstack(
            [
                arrays[f"layer{layer}_{name}_weight"][own],
                arrays[f"layer{layer}_{name}_bias"][own],
            ]
        )
        for name in NAMES
    }
    return np.hstack([x, np.ones((length, 1))]), {
        name: w.astype(np.float64) for name, w in weights.items()
    }


def problem(
    layer: int,
    head: int,
    *,
    adapt: Sequence[str] = NAMES,
    rank: int = 4,
    length: int = TOKENS,
    seed: int = 0,
    dtype: str = "float32",
    noise: float = NOISE,
    path: Path = PATH,
) -> ll.LoRAProblem:
    """The LoRA problem of one real head: Gaussian adapters, and a target near what the unadapted
    head puts out.

    alpha = rank, so scale = 1, and ||B A||_F = 0.02 ||W||_F; beta = 1 / sqrt(32). The target is the
    exact output of the frozen head plus Gaussian noise, `noise` times its root mean square, so that
    no gradient is near zero. The same seed gives the same adapters and noise whatever `adapt` and
    `dtype`.
    Raises ValueError for a (layer, head) that the file lacks, a length beyond its tokens, an
    unknown projection, a rank below 1, and float64 outside jax.enable_x64.
    """
    x, weights = inputs(layer, head, length=length, path=path)
    if unknown := sorted(set(adapt) - set(NAMES)):
        raise ValueError(f"adapt: got {unknown}, expected names among {list(NAMES)}")
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise ValueError("dtype: got float64, expected jax.enable_x64(True) around it")
    # Drawn for every projection, adapted or not: so the same seed is the same problem.
    random = np.random.default_rng([seed, layer, head])
    adapters = {name: adapter(random, weight, rank) for name, weight in weights.items()}
    output = _output(x, weights)
    target = output + noise * np.sqrt(np.mean(output**2)) * random.standard_normal(output.shape)

    def array(value: np.ndarray):
        return jnp.asarray(value, dtype)

    return ll.LoRAProblem(
        array(x),
        array(x),
        array(x),
        array(target),
        weights=ll.AttentionWeights(**{name: array(weight) for name, weight in weights.items()}),
        adapters={name: ll.Adapter(*map(array, adapters[name])) for name in NAMES if name in adapt},
        scale=1.0,
        beta=WIDTH**-0.5,
    )


def attention_rows(layer: int, head: int, *, length: int = TOKENS) -> np.ndarray:
    """The frozen head's attention, softmax(beta Q K^T), (length, length) in float64. Raises as
    `inputs` does.
    """
    x, weights = inputs(layer, head, length=length)
    return softmax((x @ weights["query"]) @ (x @ weights["key"]).T * WIDTH**-0.5)


def _output(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """softmax(beta Q K^T) V of the frozen head, some queries at a time."""
    q, k, v = (x @ weights[name] for name in NAMES)
    # Blocks of queries keep long inputs within memory.
    parts = np.split(q, range(TOKENS, len(q), TOKENS))
    return np.concatenate([softmax(part @ k.T * WIDTH**-0.5) @ v for part in parts])


def place(layer: int, head: int, path: Path = PATH) -> int:
    """Where a head lies among its layer's."""
    if (layer, head) not in heads(path):
        raise ValueError(f"(layer, head): got {(layer, head)}, expected one of {list(heads(path))}")
    return load(path)[f"layer{layer}_heads"].tolist().index(head)


def adapter(
    random: np.random.Generator, weight: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian a (rank, d) and b (d_model, rank), sharing evenly the factor that makes ||b a||_F =
    0.02 ||W||_F.
    """
    a = random.standard_normal((rank, weight.shape[1]))
    b = random.standard_normal((weight.shape[0], rank))
    factor = np.sqrt(UPDATE * np.linalg.norm(weight) / np.linalg.norm(b @ a))
    return factor * a, factor * b
