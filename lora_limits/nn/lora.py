"""LoRA attention as a Flax module: frozen projections with adapters, heads by any method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lora_limits.checks import check_integer, check_number, fail, set_integers
from lora_limits.linalg import dot
from lora_limits.nn import rotary
from lora_limits.nn.attention import attention
from lora_limits.problem import NAMES

SCALINGS = ("alpha/r", "alpha/sqrt(r)")
# What a model may adapt: attention's projections, and those of an MLP (a gate where it has one).
PROJECTIONS = (*NAMES, "output", "gate", "up", "down")
# Anything that `attention` takes, or a function (query, key, value, is_causal) -> output of the
# same layout. Hashable, as the methods are part of what a program is compiled for.
HeadMethod = Any


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What is adapted and how: W = W* + scale B A (Definition 1.1).

    scale = alpha / r, or alpha / sqrt(r). adapt: names of projections.
    Raises ValueError for a rank below 1, an unknown scaling, an alpha that is not finite, unknown
    or no projections.
    """

    rank: int = 4
    alpha: float = 4.0
    scaling: str = "alpha/r"
    adapt: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        set_integers(self, rank=1)
        if self.scaling not in SCALINGS:
            fail("scaling", repr(self.scaling), f"one of {list(SCALINGS)}")
        object.__setattr__(self, "alpha", check_number("LoRA alpha", self.alpha))
        names = isinstance(self.adapt, tuple) and set(self.adapt)
        if not names or names - set(PROJECTIONS):
            fail("adapt", repr(self.adapt), f"a tuple of names among {list(PROJECTIONS)}")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def on(self, name: str) -> LoRA | None:
        """What a projection of that name is made with: this, or None where it is not adapted."""
        return self if name in self.adapt else None


class Projection(nnx.Module):
    """x W + bias, and s (x B) A where it is adapted: (..., d_model) -> (..., d), never forming B A.

    kernel (d_model, d) and bias (d,) are nnx.Param; a (r, d), Gaussian, and b (d_model, r), zero,
    are nnx.LoRAParam. Returns the dtype of x, computed in that of x or the kernel, the wider one.
    """

    def __init__(
        self, d_model: int, d: int, lora: LoRA | None = None, *, bias: bool = False, rngs: nnx.Rngs
    ):
        kernel = jax.random.normal(rngs.params(), (d_model, d), jnp.float32)
        self.kernel = nnx.Param(kernel / math.sqrt(d_model))
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32)) if bias else None
        self.scale = 0.0
        if lora is None:
            self.a = None
            self.b = None
        else:
            self.scale = lora.scale
            a = jax.random.normal(rngs.params(), (lora.rank, d), jnp.float32)
            self.a = nnx.LoRAParam(a / math.sqrt(lora.rank))
            # B = 0: a fresh adapter changes nothing.
            self.b = nnx.LoRAParam(jnp.zeros((d_model, lora.rank), jnp.float32))

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d"]:
        dtype = _wider(x, self.kernel[...])
        wide = x.astype(dtype)
        y = dot(wide, self.kernel[...].astype(dtype))
        if self.a is not None and self.b is not None:
            # Through r columns: B A would be as large as W.
            update = dot(dot(wide, self.b[...].astype(dtype)), self.a[...].astype(dtype))
            y = y + jnp.asarray(self.scale, dtype) * update
        if self.bias is not None:
            y = y + _along_last(self.bias[...].astype(dtype), y)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """gain x / sqrt(mean x^2 + epsilon) over the last axis, in dtypes as Norm."""

    def __init__(self, width: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.gain = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        dtype = _wider(x, self.gain[...])
        wide = to_unit_size(x.astype(dtype), self.epsilon)
        return (wide * _along_last(self.gain[...].astype(dtype), wide)).astype(x.dtype)


class Norm(nnx.Module):
    """gain (x - mean x) / sd x + shift over the last axis.

    Returns the dtype of x, computed in that of x or the gain, the wider one. flax.nnx's own norm
    refuses float64 under strict promotion.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.gain = nnx.Param(jnp.ones(width, jnp.float32))
        self.shift = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        dtype = _wider(x, self.gain[...])
        wide = x.astype(dtype)
        y = to_unit_size(wide - wide.mean(-1, keepdims=True), self.epsilon)
        gain = _along_last(self.gain[...].astype(dtype), wide)
        shift = _along_last(self.shift[...].astype(dtype), wide)
        return (y * gain + shift).astype(x.dtype)


def _wider(x: jax.Array, parameter: jax.Array) -> Any:
    """The dtype of more bits of the two."""
    return max(x.dtype, parameter.dtype, key=lambda dtype: jnp.finfo(dtype).bits)


def _along_last(vector: Float[Array, " width"], x: jax.Array) -> jax.Array:
    """The vector with as many axes as x, written out because rank promotion is an error here."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def to_unit_size(
    x: Float[Array, "*batch width"], epsilon: float = 1e-6
) -> Float[Array, "*batch width"]:
    """x / sqrt(mean x^2 + epsilon) over the last axis."""
    # epsilon keeps the derivative at 0 finite.
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + epsilon)


class LoRAAttention(nnx.Module):
    """Multi-head self-attention whose projections carry adapters.

    head_h = softmax(Q_h K_h^T / sqrt(width)) V_h,    output = [head_1 ... head_n] W_O

    Tokens are (B, L, d_model); heads x width need not be d_model. key_heads: of keys and values,
    each read by heads / key_heads query heads in a row (as many as heads by default). rotary_base:
    queries and keys are turned by their positions (`rotary`). method: of ll.attention, or a
    hashable function (query, key, value, is_causal); static, so that a jitted function of the split
    module recompiles for a new method and never for one it has seen. softmax_1: exp(s_j) /
    (1 + sum exp(s)), a key and value of zeros that every query sees. normalised: every query and
    key of a head is scaled to root mean square 1, so that no score passes sqrt(width). Returns the
    dtype that it is given.
    Filters: nnx.LoRAParam holds the adapters, nnx.Param everything. Time and memory: those of the
    method.
    Raises ValueError for sizes below 1, heads that key_heads does not divide, an odd width of
    turned rows, and as LoRA and ll.attention do.
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
        key_heads: int | None = None,
        rotary_base: float | None = None,
        rngs: nnx.Rngs,
    ):
        d_model = check_integer("d_model", d_model, 1)
        self.heads = heads = check_integer("heads", heads, 1)
        self.width = width = check_integer("width", width, 1)
        self.key_heads = check_integer("key_heads", heads if key_heads is None else key_heads, 1)
        if heads % self.key_heads:
            fail("key_heads", key_heads, f"a divisor of {heads}, the heads")
        if rotary_base is not None and width % 2:
            fail("width", width, "an even one, as rotations turn pairs of coordinates")
        self.rotary_base = rotary_base
        self.adapt = lora.adapt
        self.method = method
        self.is_causal = is_causal
        self.softmax_1 = softmax_1
        self.normalised = normalised
        for name in NAMES:
            inner = width * (heads if name == "query" else self.key_heads)
            made = Projection(d_model, inner, lora.on(name), bias=bias, rngs=rngs)
            setattr(self, name, made)
        # W_O is outside of the theorems: its adapter's gradient costs O(L) whatever the method.
        self.output = Projection(heads * width, d_model, lora.on("output"), bias=bias, rngs=rngs)

    @property
    def projected(self) -> bool:
        """Whether scores are of x W_Q and x W_K themselves, nothing between them."""
        return not self.normalised and self.rotary_base is None

    def rows(
        self, x: Float[Array, "b l d_model"]
    ) -> tuple[
        Float[Array, "b l heads width"],
        Float[Array, "b l key_heads width"],
        Float[Array, "b l key_heads width"],
    ]:
        """Q, K, V of tokens, adapters in, normalised and turned by position if so asked."""
        shape = (*x.shape[:2], -1, self.width)
        q, k, v = (getattr(self, name)(x).reshape(shape) for name in NAMES)
        if self.normalised:
            q, k = to_unit_size(q), to_unit_size(k)
        if self.rotary_base is not None:
            q, k = (rotary.turn(y, self.rotary_base) for y in (q, k))
        return q, k, v

    def attend(
        self, x: Float[Array, "b l d_model"], method: HeadMethod
    ) -> Float[Array, "b l heads width"]:
        """What the heads put out, by the method given."""
        rows = self.rows(x)
        if self.softmax_1:
            # In front of all tokens, so that causal queries see it too.
            rows = tuple(jnp.pad(row, ((0, 0), (1, 0), (0, 0), (0, 0))) for row in rows)
        out = head_outputs(*rows, method=method, is_causal=self.is_causal)
        return out[:, 1:] if self.softmax_1 else out

    def __call__(
        self,
        x: Float[Array, "b l d_model"],
        probe: Float[Array, "b l heads width"] | None = None,
    ) -> Float[Array, "b l d_model"]:
        """The layer's output. probe: added to what the heads put out, to be differentiated in."""
        out = self.attend(x, self.method)
        if probe is not None:
            out = out + probe
        return self.output(out.reshape(*x.shape[:2], -1))


def head_outputs(
    q: Float[Array, "b l heads width"],
    k: Float[Array, "b l key_heads width"],
    v: Float[Array, "b l key_heads width"],
    *,
    method: HeadMethod,
    is_causal: bool,
) -> Float[Array, "b l heads width"]:
    """Attention by a method of the library, or by a function with the same layout."""
    if isinstance(method, Callable):
        return method(q, k, v, is_causal)
    return attention(q, k, v, method=method, is_causal=is_causal)
