"""`lora-limits diagnose` on tiny models of every kind: what it leaves, and what it refuses."""

import json

import jax
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.cli import main
from lora_limits.diagnose import adapters, loading, longer, methods
from lora_limits.diagnose.times import Clock
from lora_limits.problem_checks import structure_of
from tests.diagnose.with_models import refusal
from tests.support.tiny_models import TEXT, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the libraries warn of their own future


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
    for module in (methods, longer):
        monkeypatch.setattr(module, "ladder", few)
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
