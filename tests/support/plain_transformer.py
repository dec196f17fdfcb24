"""The transformer of lora_limits written out in jnp, from its parameters as a plain dictionary, and
small float64 ones.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Shape, Transformer

SMALL = {"d_model": 6, "heads": 2, "width": 3, "layers": 1, "mlp": 5}


def make(classes=3, length=8, lora=None, **options):
    """A small float64 transformer whose adapters, biases and gains are not at their starting
    values.
    """
    lora = lora or LoRA(rank=2, alpha=3.0, adapt=("query", "key", "value"))
    model = Transformer(Shape(7, classes, length, **(SMALL | options)), lora, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, float) + 0.2 * rng.normal(size=x.shape)), params
        ),
    )


def tokens(batch=2, length=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 7, (batch, length)), jnp.int32)


def average(q, k, v, is_causal):
    """The mean of the values, whatever the query: all that degree 0 knows."""
    return jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)


def project(p, x, scale):
    w = p["kernel"]
    if "a" in p:
        w = w + scale * p["b"] @ p["a"]
    return x @ w + (jnp.broadcast_to(p["bias"], (*x.shape[:-1], w.shape[1])) if "bias" in p else 0)


def normalise(p, x):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y * jnp.broadcast_to(p["gain"], x.shape) + jnp.broadcast_to(p["shift"], x.shape)


def attend(p, x, scale, *, heads, width, causal=False, softmax_1=False, normalised=False):
    """exp(s) / sum exp(s), or exp(s) / (1 + sum exp(s)): one sequence (L, d_model) -> (L,
    d_model).
    """
    outputs = []
    for h in range(heads):
        q, k, v = (
            project(p[n], x, scale)[:, h * width : (h + 1) * width]
            for n in ("query", "key", "value")
        )
        if normalised:
            q, k = (y / jnp.sqrt((y**2).mean(1, keepdims=True) + 1e-6) for y in (q, k))
        e = jnp.exp(q @ k.T / math.sqrt(width))
        e = jnp.tril(e) if causal else e
        outputs.append(e @ v / (e.sum(1, keepdims=True) + int(softmax_1)))
    return project(p["output"], jnp.concatenate(outputs, 1), scale)


def forward(p, tokens, shape, scale):
    """Logits of one sequence (L,)."""
    x = p["embedding"][tokens] + p["position"][: len(tokens)]
    for n in range(shape.layers):
        b = p["blocks"][n]
        sizes = {
            "heads": shape.heads,
            "width": shape.width,
            "softmax_1": shape.softmax_1,
            "normalised": shape.normalised,
        }
        x = x + attend(
            b["attention"],
            normalise(b["attention_norm"], x),
            scale,
            causal=shape.classes is None,
            **sizes,
        )
        x = x + project(
            b["down"], jax.nn.gelu(project(b["up"], normalise(b["mlp_norm"], x), scale)), scale
        )
    x = normalise(p["norm"], x)
    return project(p["head"], x if shape.classes is None else x.mean(0), scale)


def logits(p, tokens, shape, scale):
    return jax.vmap(lambda t: forward(p, t, shape, scale))(tokens)
