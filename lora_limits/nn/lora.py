"""LoRA attention as a Flax module: frozen projections with adapters, heads by any method of the
library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_limits.linalg import dot
from lora_limits.nn.attention import attention
from lora_limits.problem import NAMES

SCALINGS = ("alpha/r", "alpha/sqrt(r)")
# Anything that `attention` takes, or a function (query, key, value, is_causal) -> output laid out
# alike. Hashable.
HeadMethod = Any


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What is adapted and how: W = W* + scale B A (Definition 1.1), scale = alpha / r or alpha /
    sqrt(r).

    Raises ValueError for a rank below 1, an unknown scaling, an alpha that is not finite, unknown
    or no projections.
    """

    rank: int = 4
    alpha: float = 4.0
    scaling: str = "alpha/r"
    adapt: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: got {self.rank!r}, expected an integer of at least 1")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling: got {self.scaling!r}, expected one of {list(SCALINGS)}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha: got {self.alpha!r}, expected a finite number")
        if not isinstance(self.adapt, tuple) or not self.adapt or set(self.adapt) - set(NAMES):
            raise ValueError(
                f"adapt: got {self.adapt!r}, expected a tuple of names among {list(NAMES)}"
            )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))


class Projection(nnx.Module):
    """x W + bias, and s (x B) A where it is adapted: (..., d_model) -> (..., d), never forming B A.

    kernel: (d_model, d) and bias: (d,) are nnx.Param; a: (r, d), Gaussian, and b: (d_model, r),
    zero, nnx.LoRAParam.
    """

    def __init__(
        self, d_model: int, d: int, lora: LoRA | None = None, *, bias: bool = False, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (d_model, d), jnp.float32) / math.sqrt(d_model)
        )
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32)) if bias else None
        self.scale = lora.scale if lora else 0.0
        r = lora.rank if lora else 0
        self.a = (
            nnx.LoRAParam(jax.random.normal(rngs.params(), (r, d), jnp.float32) / math.sqrt(r))
            if r
            else None
        )
        self.b = nnx.LoRAParam(jnp.zeros((d_model, r), jnp.float32)) if r else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = dot(x, self.kernel[...])
        if self.a is not None and self.b is not None:
            y = y + jnp.asarray(self.scale, y.dtype) * dot(dot(x, self.b[...]), self.a[...])
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


class Norm(nnx.Module):
    """gain (x - mean x) / sd x + shift over the last axis, in the dtype of x.

    flax.nnx's own norm refuses float64 under strict promotion.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.gain = nnx.Param(jnp.ones(width, jnp.float32))
        self.shift = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = (1,) * (x.ndim - 1) + (-1,)
        y = to_unit_size(x - x.mean(-1, keepdims=True), self.epsilon)
        return y * self.gain[...].reshape(lead) + self.shift[...].reshape(lead)


def to_unit_size(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / sqrt(mean x^2 + epsilon) over the last axis."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + epsilon)


class LoRAAttention(nnx.Module):
    """Multi-head self-attention whose query, key and value projections carry adapters.

    head_h = softmax(Q_h K_h^T / sqrt(width)) V_h, output = [head_1 ... head_n] W_O; tokens (B, L,
    d_model), and
    heads x width need not be d_model. method: of ll.attention, or a hashable function (query, key,
    value, is_causal); static, so that a jitted function of the split module recompiles for a new
    method and never for one it has seen. softmax_1: exp(s_j) / (1 + sum exp(s)), a key and value of
    zeros that every query sees. normalised: every query and key of a head is scaled to root mean
    square 1, so that no score passes sqrt(width). Filters: nnx.LoRAParam holds the adapters,
    nnx.Param everything. Time and memory: those of the method. Raises ValueError for sizes below 1,
    and as LoRA and ll.attention do.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        width: int,
        lora: LoRA,
        *,
        method: HeadMethod,
        is_causal: bool = False,
        softmax_1: bool = False,
        normalised: bool = False,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        for name, size in (("d_model", d_model), ("heads", heads), ("width", width)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer of at least 1")
        self.heads, self.width, self.adapt = heads, width, lora.adapt
        self.method, self.is_causal, self.softmax_1, self.normalised = (
            method,
            is_causal,
            softmax_1,
            normalised,
        )
        inner = heads * width
        for name in NAMES:
            adapted = lora if name in lora.adapt else None
            setattr(self, name, Projection(d_model, inner, adapted, bias=bias, rngs=rngs))
        self.output = Projection(inner, d_model, bias=bias, rngs=rngs)

    def rows(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Q, K, V of tokens (B, L, d_model), adapters in, normalised if so asked: (B, L, heads,
        width) each.
        """
        q, k, v = (
            getattr(self, name)(x).reshape(*x.shape[:2], self.heads, self.width) for name in NAMES
        )
        return (to_unit_size(q), to_unit_size(k), v) if self.normalised else (q, k, v)

    def attend(self, x: jax.Array, method: HeadMethod) -> jax.Array:
        """What the heads put out, by the method given: (B, L, d_model) -> (B, L, heads, width)."""
        rows = self.rows(x)
        if self.softmax_1:  # in front of all, so that causal queries see it too
            rows = tuple(jnp.pad(row, ((0, 0), (1, 0), (0, 0), (0, 0))) for row in rows)
        out = head_outputs(*rows, method=method, is_causal=self.is_causal)
        return out[:, 1:] if self.softmax_1 else out

    def __call__(self, x: jax.Array, probe: jax.Array | None = None) -> jax.Array:
        """(B, L, d_model) -> (B, L, d_model). probe (B, L, heads, width) is added to what the heads
        put out.
        """
        out = self.attend(x, self.method)
        if probe is not None:
            out = out + probe
        return self.output(out.reshape(*x.shape[:2], -1))


def head_outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, *, method: HeadMethod, is_causal: bool
) -> jax.Array:
    """Attention by a method of the library, or by a function with the same layout: (B, L, heads,
    width).
    """
    if isinstance(method, Callable):
        return method(q, k, v, is_causal)
    return attention(q, k, v, method=method, is_causal=is_causal)
