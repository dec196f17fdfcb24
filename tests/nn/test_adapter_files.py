"""Adapters in PEFT's format: there and back, against peft's own reading and writing, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_limits as ll
from lora_limits.nn import adapter_files, pretrained
from lora_limits.nn.lora import LoRA
from tests.support import plain_llama
from tests.support.tiny_models import tiny
from tests.support.tools import extra

ADAPTED = {
    "llama": ("query", "key", "value", "output", "gate", "up", "down"),
    "bert": ("query", "value", "output", "down"),
}


def load(folder, lora, method=None):
    return pretrained.load(folder, lora, method=method or ll.Exact(), rngs=nnx.Rngs(0))


def adapted(folder, lora):
    """A model whose adapters are not at their start."""
    graphdef, adapters, rest = nnx.split(load(folder, lora), nnx.LoRAParam, ...)
    rng = np.random.default_rng(3)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), adapters
    )
    return nnx.merge(graphdef, drawn, rest)


def halves(model):
    return jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    return plain_llama.write(tmp_path / "base")


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_adapters_come_back_as_they_were(base, tmp_path, scaling):
    lora = LoRA(3, 5.0, scaling, ("query", "down", "output"))
    model = adapted(base, lora)
    adapter_files.save(model, tmp_path / "adapter")
    again = load(base, tmp_path / "adapter")
    assert set(again.lora.adapt) == set(lora.adapt)
    assert again.blocks[1].down.scale == model.blocks[1].down.scale == lora.scale
    assert len(halves(model)) == 2 * 3 * plain_llama.LAYERS
    for a, b in zip(halves(model), halves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def written(base, tmp_path):
    """(base, the adapters' folder, a function that changes what lies in it)."""
    folder = tmp_path / "adapter"
    adapter_files.save(adapted(base, LoRA(2, 4.0, adapt=("query", "up"))), folder)

    def change(config=(), **arrays):
        path = folder / adapter_files.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
        kept = load_file(folder / adapter_files.WEIGHTS) | arrays
        kept = {n: a for n, a in kept.items() if a is not None}
        save_file(kept, folder / adapter_files.WEIGHTS)

    return base, folder, change


AT = "base_model.model.model.layers."
UP = f"{AT}1.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"peft_type": "LOHA"}}, "peft_type: got 'LOHA', expected one of"),
        ({"config": {"bias": "all"}}, "bias: got 'all'"),
        ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights: got 'pissa'"),
        ({"config": {"rank_pattern": {"up_proj": 3}}}, "rank_pattern: got"),
        ({f"{AT}0.mlp.up_proj.lora_magnitude_vector": np.ones(7, "f4")}, "magnitude_vector"),
        ({f"{AT}2.mlp.up_proj.lora_A.weight": np.ones((2, 10), "f4")}, "an adapter of layer 2's"),
        ({f"{UP}A.weight": np.ones((2, 9), "f4")}, r"layers.1.mlp.up_proj: got shape \(9, 2\)"),
        ({f"{UP}A.weight": None}, "layer 1's mlp.up_proj: got one half, expected both"),
    ],
    ids=str,
)
def test_what_is_no_plain_adapter_of_this_model_is_refused(written, change, said):
    base, folder, changed = written
    changed(**change)
    with pytest.raises(ValueError, match=said):
        load(base, folder)


def test_layers_without_an_adapter_add_nothing_and_no_folder_is_refused(written, tmp_path):
    base, folder, change = written
    change(**{f"{UP}A.weight": None, f"{UP}B.weight": None})
    model = load(base, folder)
    assert not np.any(model.blocks[1].up.b[...])
    assert np.any(model.blocks[0].up.b[...])
    with pytest.raises(ValueError, match=r"nowhere: got .* expected adapters of PEFT"):
        load(base, tmp_path / "nowhere")


# -------------------------------------------------------------------------------------- peft


def outputs(peft_model, ids):
    torch = extra("torch")
    with torch.no_grad():
        out = peft_model.eval()(input_ids=torch.as_tensor(ids))
    return getattr(out, "logits", getattr(out, "last_hidden_state", None)).numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # peft and transformers deprecate each other's names
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_peft_reads_what_is_written_and_what_peft_writes_is_read(kind, tmp_path):
    torch, transformers, peft = extra("torch"), extra("transformers"), extra("peft")
    folder = tiny(kind, tmp_path / "model")
    auto = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel
    ids = np.random.default_rng(0).integers(0, 12, (2, 24))

    def theirs():
        return auto.from_pretrained(folder, dtype=torch.float32)

    ours = adapted(folder, LoRA(3, 6.0, "alpha/sqrt(r)", ADAPTED[kind]))
    adapter_files.save(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours")
    want = np.asarray(ours(jnp.asarray(ids, jnp.int32)))
    np.testing.assert_allclose(outputs(read, ids), want, atol=2e-4)
    bare = np.asarray(load(folder, LoRA())(jnp.asarray(ids, jnp.int32)))
    assert np.abs(want - bare).max() > 0.1

    targets = {"llama": ["q_proj", "gate_proj"], "bert": ["query", "intermediate.dense"]}[kind]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    made = peft.get_peft_model(theirs(), config)
    made.save_pretrained(tmp_path / "theirs")
    back = load(folder, tmp_path / "theirs")
    got = np.asarray(back(jnp.asarray(ids, jnp.int32)))
    np.testing.assert_allclose(got, outputs(made, ids), atol=2e-4)
    assert np.abs(got - bare).max() > 0.1
