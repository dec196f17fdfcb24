"""Decoders of Llama's kind read from safetensors: a tiny one against its definition and against
transformers, the real one against transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import save_file as save_flax

import lora_limits as ll
from lora_limits.nn import llama, per_layer, pretrained
from lora_limits.nn.lora import LoRA
from lora_limits.training import loop
from tests.support import plain_llama
from tests.support.smollm2 import smollm2
from tests.support.tiny_models import tiny
from tests.support.tools import extra, quick_jit

EVERY = LoRA(rank=2, alpha=3.0, adapt=("query", "key", "value", "output", "gate", "up", "down"))


EXACT = ll.Exact()


def load(folder, lora=EVERY, method=EXACT):
    return llama.load(folder, lora, method=method, rngs=nnx.Rngs(0))


def tokens(length=9, batch=2, seed=0):
    drawn = np.random.default_rng(seed).integers(0, plain_llama.VOCABULARY, (batch, length))
    return jnp.asarray(drawn, jnp.int32)


def moved(model, seed=1):
    """The model in float64, its adapters away from zero."""
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), adapters)
    return nnx.merge(graphdef, drawn, jax.tree.map(lambda x: x.astype(jnp.float64), rest))


def updates(model):
    """{path: the update of its weight as a file holds it} of every adapted projection."""
    found = {}
    for n, block in enumerate(model.blocks):
        for ours, theirs in llama.PARTS.items():
            module = block
            for name in ours.split("."):
                module = getattr(module, name)
            if getattr(module, "a", None) is not None:
                found[f"layers.{n}.{theirs}"] = module.scale * (module.b[...] @ module.a[...]).T
    return found


def test_a_loaded_decoder_is_the_definition_with_its_adapters(tmp_path):
    model = moved(load(plain_llama.write(tmp_path)))
    weights = {n: jnp.asarray(a, jnp.float64) for n, a in plain_llama.arrays().items()}
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, plain_llama.VOCABULARY)))

    def ours(adapters):
        return nnx.merge(graphdef, adapters, rest)(tokens())

    def plain(adapters):
        found = updates(nnx.merge(graphdef, adapters, rest))
        return jax.vmap(lambda t: plain_llama.logits(weights, t, found))(tokens())

    def both(function):
        out, back = jax.vjp(function, adapters)
        return out, back(cotangent)

    got, want = quick_jit(lambda: (both(ours), both(plain)))()
    assert len(jax.tree.leaves(want[1])) == 2 * 7 * plain_llama.LAYERS
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, np.abs(b).max()))


def test_nothing_of_what_is_to_come_is_seen_and_positions_count(tmp_path):
    model = moved(load(plain_llama.write(tmp_path), method=ll.Polynomial(2, block_size=4)))
    run = quick_jit(lambda t: model(t))
    one = tokens()
    two = one.at[:, 5].set((one[:, 5] + 1) % plain_llama.VOCABULARY)
    before, after = run(one), run(two)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (jnp.abs(before - after)[:, 5:].max((0, 2)) > 1e-6).all()


def test_untied_logits_and_half_precision_files_are_read(tmp_path):
    head = np.random.default_rng(5).normal(size=(plain_llama.VOCABULARY, plain_llama.D_MODEL))
    whole = plain_llama.arrays() | {"lm_head.weight": head.astype("f4")}
    half = {n: jnp.asarray(a, jnp.bfloat16) for n, a in whole.items()}
    plain_llama.write(tmp_path, {"tie_word_embeddings": False})
    save_flax(half, tmp_path / "model.safetensors")
    model = load(tmp_path)
    weights = {n: jnp.asarray(a, jnp.float64) for n, a in half.items()}
    got = quick_jit(lambda t: model(t))(tokens())
    want = quick_jit(jax.vmap(lambda t: plain_llama.logits(weights, t)))(tokens())
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_rematerialised_layers_give_the_same_gradient_and_keep_less(tmp_path):
    model = load(plain_llama.write(tmp_path))

    def back(remat):
        model.remat = remat
        graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(adapters):
            logits = nnx.merge(graphdef, adapters, rest)(tokens(batch=4, length=16))
            return loop.loss(logits, tokens(batch=4, length=16, seed=1))

        kept = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(loss, a)[1], adapters))
        return quick_jit(jax.grad(loss))(adapters), sum(x.size for x in kept)

    (plain, whole), (again, less) = back(False), back(True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # Besides the weights: one array of (4, 16, d_model) a layer instead of scores and MLPs.
    assert less < whole / 2


def test_norms_are_those_of_turned_rows_of_every_query_head(tmp_path):
    model = moved(load(plain_llama.write(tmp_path)))

    def run(t):
        read = model.trace(t)[1]
        return per_layer.norms(model, t), [
            block.attention.rows(x) for block, x in zip(model.blocks, read, strict=True)
        ]

    reports, rows = jax.tree.map(np.asarray, quick_jit(run)(tokens()))
    for report, (q, k, _) in zip(reports, rows, strict=True):
        k = np.repeat(k, 2, axis=2)
        want = np.maximum(abs(q).max((1, 3)), abs(k).max((1, 3)))
        np.testing.assert_allclose(report.gamma, want, rtol=1e-12)
        scores = abs(np.einsum("blhd,bmhd->bhlm", q, k)).max((2, 3)) * plain_llama.WIDTH**-0.5
        assert (report.score_bound_raw >= scores).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"model_type": "mistral"}}, "model_type: got 'mistral', expected 'llama'"),
        ({"config": {"hidden_act": "gelu"}}, "hidden_act: got 'gelu'"),
        ({"config": {"attention_bias": True}}, "attention_bias: got True, expected False"),
        (
            {"config": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}},
            "rope_type: got 'llama3', expected 'default'",
        ),
        ({"config": {"num_key_value_heads": 3}}, "key_heads: got 3, expected a divisor of 4"),
        ({"model.norm.weight": None}, "norm: got none"),
        (
            {"model.layers.1.mlp.up_proj.weight": np.zeros((2, 3), np.float32)},
            r"layers.1.mlp.up_proj: got shape \(3, 2\)",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)},
            "layers.0.self_attn.q_proj: got a bias, expected none",
        ),
    ],
    ids=str,
)
def test_what_is_not_such_a_decoder_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        load(plain_llama.write(tmp_path, **change))


def test_the_kind_is_read_from_the_folder(tmp_path):
    plain_llama.write(tmp_path)
    model = pretrained.load(tmp_path, EVERY, method=ll.Exact(), rngs=nnx.Rngs(0))
    assert isinstance(model, llama.Llama)
    with pytest.raises(ValueError, match="tokens: got 17 of them, expected at most 16"):
        model(tokens(length=17))
    plain_llama.write(tmp_path, {"model_type": "mamba"})
    with pytest.raises(ValueError, match="model_type: got 'mamba', expected one of"):
        pretrained.load(tmp_path, EVERY, method=ll.Exact(), rngs=nnx.Rngs(0))
    plain_llama.write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="expected a model's folder"):
        load(tmp_path)


# ------------------------------------------------------------------------------- transformers


def theirs(folder, ids, precision="float32"):
    torch, transformers = extra("torch"), extra("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = model.to(getattr(torch, precision))
    with torch.no_grad():
        return model(torch.as_tensor(ids)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=str)
def test_a_tiny_decoder_puts_out_what_transformers_does(tmp_path, options):
    extra("transformers")
    folder = tiny("llama", tmp_path, **options)
    ids = np.random.default_rng(0).integers(0, 12, (2, 48))
    got = quick_jit(load(folder))(jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(got, theirs(folder, ids), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_real_decoder_puts_out_what_transformers_does():
    """SmolLM2-135M, whose logits reach 33. Two runs in single precision part by 1.4e-4 there, as each
    is rounded: what is held to is transformers' own in double precision.
    """
    folder = smollm2()
    ids = np.random.default_rng(0).integers(1000, 20000, (1, 128))
    got = np.asarray(jax.jit(load(folder, method=ll.Exact(64)))(jnp.asarray(ids, jnp.int32)))
    want = theirs(folder, ids, "float64")
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    # and no further from it than they are themselves, or little
    assert np.abs(got - want).max() < 1.5 * np.abs(theirs(folder, ids) - want).max()
