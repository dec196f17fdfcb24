"""A method as the `attention_fn` of flax.nnx.MultiHeadAttention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax.nnx.nn import dtypes

from lora_limits.checks import fail
from lora_limits.method import Method
from lora_limits.nn.attention import attention


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """nnx.MultiHeadAttention(..., attention_fn=AttentionFn(method)): `attention` by that method.

    Frozen and equal where methods are, so that a module compiles once for each. Any number of batch
    axes; query, key and value are brought to one dtype as Flax does it. mask: of keys, (..., 1, 1,
    keys), what nnx.make_attention_mask makes of one query, and the cache of a decoder.
    Raises ValueError for masks of pairs (nnx.make_causal_mask: say is_causal=True), for a bias, for
    dropout of the weights and for weights to be sown, which are never formed; and as `attention`.
    """

    method: Method

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Any = dtypes.promote_dtype,
        is_causal: bool = False,
    ) -> jax.Array:
        """Arguments as of nnx.dot_product_attention; precision is always the highest."""
        del broadcast_dropout, dropout_rng, precision
        if dropout_rate > 0 and not deterministic:
            fail("dropout_rate", dropout_rate, "0, or deterministic: there are no weights to drop")
        if module is not None:
            fail("sow_weights", True, "False: the weights are never formed")
        q, k, v = promote_dtype((query, key, value), dtype=dtype)
        batch = q.shape[:-3]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        if mask is not None and mask.ndim > 4:
            mask = mask.reshape(-1, *mask.shape[-3:])
        out = attention(q, k, v, method=self.method, bias=bias, mask=mask, is_causal=is_causal)
        return out.reshape(*batch, *out.shape[1:])
