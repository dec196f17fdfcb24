"""Adapters as peft writes and reads them: there and back, whose they are, which do not fit."""

import json

import numpy as np
import pytest

from lora_limits.diagnose import adapters, loading, projections
from lora_limits.diagnose.layers import NAMES
from tests.diagnose.recorded import recorded
from tests.diagnose.with_models import outputs, refusal
from tests.support.tiny_models import KINDS, TEXT, tiny
from tests.support.tools import extra

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the libraries warn of their own future


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_through_peft_and_back_with_equal_outputs(kind, made, tmp_path):
    with recorded(made(kind)) as found:
        before = outputs(found.adapted)
        found.adapted.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    with recorded(made(kind), tmp_path / "one") as found:
        np.testing.assert_array_equal(outputs(found.adapted), before)
        if kind == "llama":  # coordinates of its heads are in another order, and heads share keys
            return
        halves = {}
        for place in found.recordings.places:
            layers = found.recordings.layers(place.number)
            whole = found.projections(place.number, layers)
            own = [head.problem.adapters for head in found.heads(place.number).values()]
            names = NAMES if place.fused else ("query", "value")
            for path in {place.projections[n] for n in names}:
                here = [n for n in names if place.projections[n] == path]
                columns = [whole[n].columns for n in here] if place.fused else None
                halves[path] = projections.join(
                    [a[n] for n in here for a in own],
                    whole["query"].weight.shape[0],
                    None if columns is None else np.concatenate(columns),
                )
    blank = adapters.random_adapter(loading.load_model(made(kind)), seed=1)
    assert np.abs(outputs(blank) - before).max() > 1e-4
    adapters.write_adapter(blank, halves, tmp_path / "two")
    third = adapters.load_adapter(loading.load_model(made(kind)), tmp_path / "two")
    np.testing.assert_allclose(outputs(third), before, rtol=1e-6, atol=1e-6)


def test_an_adapter_that_lies_in_the_models_folder_is_left_alone(tmp_path):
    extra("peft")
    folder = tiny("bert", tmp_path / "model")
    before = outputs(loading.load_model(folder))
    adapted = adapters.random_adapter(loading.load_model(folder))
    changed = outputs(adapted)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    model = loading.load_model(folder)
    np.testing.assert_array_equal(outputs(model), before)
    # and it is loaded where it is asked for
    np.testing.assert_allclose(outputs(adapters.load_adapter(model, folder)), changed, atol=1e-6)


def test_what_is_trained_beside_attention_is_a_part_of_the_model(made, tmp_path):
    import peft
    import torch

    def through(kind, name, save, **options):
        """A random adapter of such a config, saved and loaded: the same outputs."""
        config = peft.LoraConfig(**({"target_modules": ["q_proj", "v_proj"]} | options))
        adapted = peft.get_peft_model(loading.load_model(made(kind)), config).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=save)
        back = adapters.load_adapter(loading.load_model(made(kind)), tmp_path / name)
        np.testing.assert_allclose(outputs(back), outputs(adapted), atol=1e-5)

    through("llama", "embed", False, target_modules=["q_proj", "embed_tokens", "lm_head"])
    through("llama", "saved", True)
    through("llama", "tokens", False, trainable_token_indices=[1, 2])
    through("llama", "orthogonal", False, init_lora_weights="orthogonal", r=4)
    through("llama", "ranks", False, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})
    through("bert-classes", "classes", False, target_modules=["query"], task_type="SEQ_CLS")


def test_another_models_adapter_of_the_same_shapes_is_refused(made, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    options = {"head_dim": 8, "sliding_window": None}
    other = tiny("mistral", tmp_path / "mistral", **options)
    llama = tiny("llama", tmp_path / "llama", head_dim=8)
    adapted = adapters.random_adapter(loading.load_model(llama))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    given = ("--text", text, "--length", "20", "--adapter", tmp_path / "adapter")
    said = refusal(capsys, other, *given)
    assert "got an adapter of a LlamaForCausalLM, expected one of a MistralForCausalLM" in said
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"auto_mapping": None}
    model = loading.load_model(other)

    def note(base):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        return adapters.check_base(tmp_path / "adapter", model, other)

    with pytest.raises(ValueError, match="a llama, expected one of a mistral; if it is this"):
        note(str(llama))
    with pytest.raises(ValueError, match="a llama, expected one of a mistral"):
        note("meta-llama/Llama-2-7b-hf")
    assert note(str(other)) is None
    assert note("mistralai/Mistral-7B-v0.1").startswith("The adapter names mistralai/Mistral-7B")
    assert "taken on trust" in note("somebody/my-finetune")


def test_adapters_that_do_not_fit_are_refused(made, tmp_path, capsys):
    import peft

    text = tmp_path / "text"
    text.write_text(TEXT)

    def save(kind, name, **options):
        model = loading.load_model(made(kind) if kind in KINDS else kind)
        config = peft.LoraConfig(**({"target_modules": ["query"]} | options))
        peft.get_peft_model(model, config).save_pretrained(
            tmp_path / name, save_embedding_layers=False
        )
        return refusal(
            capsys, made("bert"), "--text", text, "--length", "16", "--adapter", tmp_path / name
        )

    assert "use_dora" in save("bert", "dora", use_dora=True)
    assert "modules_to_save" in save("bert", "saved", modules_to_save=["key"])
    assert "bias" in save("bert", "bias", bias="all")
    assert "an adapter of a OPTForCausalLM" in save("opt", "opt", target_modules=["q_proj"])
    assert "another model" in save(tiny("bert", tmp_path / "wide", hidden_size=40), "wider")
    assert "other modules" in save("bert", "mlp", target_modules=["intermediate.dense"])
    said = refusal(
        capsys, made("bert"), "--text", text, "--length", "16", "--adapter", tmp_path / "nowhere"
    )
    assert "no adapter_config.json" in said
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "adapter_config.json").write_text("[]")
    said = refusal(
        capsys, made("bert"), "--text", text, "--length", "16", "--adapter", tmp_path / "nowhere"
    )
    assert "got list, expected an object" in said
