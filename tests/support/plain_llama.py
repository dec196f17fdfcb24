"""A tiny random Llama: its folder as transformers would write it, and its definition from its arrays."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

HEADS, KEY_HEADS, WIDTH, D_MODEL, MLP, LAYERS, VOCABULARY = 4, 2, 6, 10, 7, 2, 11
BASE = 50.0
CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "head_dim": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": MLP,
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    "tie_word_embeddings": True,
}
SHAPES = {
    "input_layernorm": (D_MODEL,),
    "self_attn.q_proj": (HEADS * WIDTH, D_MODEL),
    "self_attn.k_proj": (KEY_HEADS * WIDTH, D_MODEL),
    "self_attn.v_proj": (KEY_HEADS * WIDTH, D_MODEL),
    "self_attn.o_proj": (D_MODEL, HEADS * WIDTH),
    "post_attention_layernorm": (D_MODEL,),
    "mlp.gate_proj": (MLP, D_MODEL),
    "mlp.up_proj": (MLP, D_MODEL),
    "mlp.down_proj": (D_MODEL, MLP),
}


def arrays(seed=0):
    """Random arrays under transformers' names, those of scores large enough that a mistake shows."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (VOCABULARY, D_MODEL), "model.norm": (D_MODEL,)}
    for n in range(LAYERS):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in SHAPES.items()}
    return {
        f"{name}.weight": (rng.normal(size=shape) * (0.4 if len(shape) > 1 else 1)).astype("f4")
        for name, shape in shapes.items()
    }


def write(folder, config=(), **changed):
    """The folder, with config fields and arrays changed, or left out where they are None."""
    kept = {n: a for n, a in (arrays() | changed).items() if a is not None}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(config)))
    return folder


def turned(x):
    """Rotary positions by complex numbers: x_i + j x_(i + width / 2) times e^(j t theta_i)."""
    half = WIDTH // 2
    theta = BASE ** (-2 * np.arange(half) / WIDTH)
    at = np.arange(len(x))[:, None] * theta[None]
    z = jax.lax.complex(x[:, :half], x[:, half:]) * jnp.exp(1j * at)
    return jnp.concatenate([z.real, z.imag], 1)


def logits(weights, tokens, adapters=None):
    """Logits of one sequence. adapters: {path: update of the weight as the file holds it}."""

    def weight(name):
        w = weights[f"model.{name}.weight"]
        return w + adapters[name] if adapters and name in adapters else w

    def norm(name, x):
        scaled = x / jnp.sqrt((x**2).mean(1, keepdims=True) + CONFIG["rms_norm_eps"])
        return scaled * weight(name)[None]

    embedding = weight("embed_tokens")
    x = embedding[tokens]
    for n in range(LAYERS):
        at = f"layers.{n}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (y @ weight(f"{at}.self_attn.{p}_proj").T for p in "qkv")
        heads = []
        for h in range(HEADS):
            group = h * KEY_HEADS // HEADS
            own, shared = (slice(m * WIDTH, (m + 1) * WIDTH) for m in (h, group))
            scores = turned(q[:, own]) @ turned(k[:, shared]).T / math.sqrt(WIDTH)
            e = jnp.tril(jnp.exp(scores))
            heads.append(e @ v[:, shared] / e.sum(1, keepdims=True))
        x = x + jnp.concatenate(heads, 1) @ weight(f"{at}.self_attn.o_proj").T
        y = norm(f"{at}.post_attention_layernorm", x)
        gate, up = (y @ weight(f"{at}.mlp.{p}_proj").T for p in ("gate", "up"))
        x = x + (gate / (1 + jnp.exp(-gate)) * up) @ weight(f"{at}.mlp.down_proj").T
    return norm("norm", x) @ weights.get("lm_head.weight", embedding).T
