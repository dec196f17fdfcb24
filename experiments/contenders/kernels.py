"""Gradients as an accelerator's own kernels give them, beside the library's. Nothing elsewhere
knows of a GPU.

The attentions are as in `baselines`: (q, k, v, beta) -> softmax(beta q k^T) v. Their products take
`jax.default_matmul_precision`, which must be set while their gradient is traced and not only in the
attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_limits as ll
from experiments.contenders import baselines
from experiments.contenders.methods import exact_methods
from lora_limits.instruments import timing
from lora_limits.polynomial import monomials


class Contender(NamedTuple):
    """function: problem -> (gradient, bound or None). precision: of products that state none.
    kernel: only for GPUs.
    """

    family: str
    function: Callable[[ll.LoRAProblem], Any]
    dtype: str = "float32"
    precision: str = "highest"
    kernel: bool = False
    features: int | None = None


def _heads(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, width: int
) -> list[jax.Array]:
    """beta q, k and v as (1, L, 1, width), padded with zeros, which change neither scores nor what
    is kept.
    """
    return [jnp.pad(x, ((0, 0), (0, width - x.shape[1])))[None, :, None] for x in (beta * q, k, v)]


def xla(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    """jax.nn.dot_product_attention by XLA: dense, O(Lq Lk) time and memory; any backend."""
    heads = _heads(q, k, v, beta, max(q.shape[1], v.shape[1]))
    return jax.nn.dot_product_attention(*heads, scale=1.0, implementation="xla")[
        0, :, 0, : v.shape[1]
    ]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    """cuDNN's flash attention: bfloat16 inside, the width padded to a multiple of 8. O(Lq Lk) time,
    O(L) memory.
    """
    width = -(-max(q.shape[1], v.shape[1]) // 8) * 8
    heads = [x.astype(jnp.bfloat16) for x in _heads(q, k, v, beta, width)]
    out = jax.nn.dot_product_attention(*heads, scale=1.0, implementation="cudnn")
    return out[0, :, 0, : v.shape[1]].astype(q.dtype)


def pallas(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas flash attention, by Triton: the width padded to 16, 32, 64, ... O(Lq Lk) time,
    O(L) memory.

    interpret: run the kernel step by step, on any backend. Raises ValueError for lengths above 128
    that are no multiple of 128, its block, and for Lq != Lk.
    """
    # Here, for it is deprecated from JAX 0.11 on and warns where it is imported.
    from jax.experimental.pallas.ops.gpu import attention

    width = max(16, 1 << (max(q.shape[1], v.shape[1]) - 1).bit_length())
    out: Any = attention.mha(*_heads(q, k, v, beta, width), segment_ids=None, interpret=interpret)
    return out[0, :, 0, : v.shape[1]]


def _exact(attention: baselines.Attention, **options: Any) -> Contender:
    return Contender("exact", lambda p: (baselines.gradient(p, attention), None), **options)


def _library(family: str, method: ll.Method, **options: Any) -> Contender:
    """A method of the library; its bound is computed for the family "certified" alone."""

    def run(problem: ll.LoRAProblem):
        result = ll.gradient(problem, method)
        return result.gradient, result.bound if family == "certified" else None

    return Contender(family, run, **options)


def contenders(
    tiles: Sequence[int], methods: Mapping[str, ll.Polynomial], width: int
) -> dict[str, Contender]:
    """Every contender by name, in the order in which they are run: the exact ones first."""
    out = {
        "XLA": _exact(xla),
        "XLA, TF32": _exact(xla, precision="tensorfloat32", kernel=True),
        "Pallas": _exact(pallas, kernel=True),
        "cuDNN": _exact(cudnn, dtype="bfloat16", kernel=True),
    }
    # Every tile: a longer one than the sequence is cut to it.
    tiled = exact_methods(max(tiles), tiles, name="tiled")
    out |= {name: _library("exact", method) for name, method in tiled.items()}
    for name, method in methods.items():
        k = monomials.count(width, method.degree)
        out[name] = _library("polynomial", method, features=k)
        out[f"{name}, certified"] = _library("certified", method, features=k)
    return out


def attempt(
    contender: Contender, problem: ll.LoRAProblem, most_bytes: float
) -> tuple[dict[str, Any], Any, Any]:
    """(metrics, program, value) of one run; where there is none, "left_out" says why and the last
    two are None.
    """
    out: dict[str, Any] = {}
    if contender.kernel and jax.default_backend() != "gpu":
        return {"left_out": f"needs a GPU, and this is {jax.devices()[0].device_kind}"}, None, None
    try:
        with jax.default_matmul_precision(contender.precision):
            program, out["compile"] = timing.compile_seconds(jax.jit(contender.function), problem)
        size = out["temporary"] = timing.temporary_bytes(program)
        if (size or 0) > most_bytes:
            needed = f"needs {(size or 0) / 1e9:.3g} GB of working memory"
            return out | {"left_out": needed}, None, None
        return out, program, jax.block_until_ready(program(problem))
    except Exception as error:
        # Whatever a kernel refuses or a device runs out of: the others go on.
        said = str(error).strip().partition("\n")[0]
        return out | {"left_out": f"{type(error).__name__}: {said[:200]}"}, None, None
