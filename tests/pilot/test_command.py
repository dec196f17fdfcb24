"""`lora-limits pilot`: texts cut into tasks, refusals in one line, and the whole way with peft."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lora_limits.cli import main
from lora_limits.pilot import records, texts
from lora_limits.pilot.settings import Settings, check_features, read_method, read_targets
from tests.support.tiny_models import TEXT, tiny
from tests.support.tools import extra


class Words:
    """A tokenizer as the library's: one token a word, cut where it is told."""

    def __init__(self):
        self.most = 10**9

    def enable_truncation(self, most):
        self.most = most

    def encode(self, text):
        class Row:
            ids = [int(word) for word in text.split()][: self.most]

        return Row

    def encode_batch(self, lines):
        return [self.encode(line) for line in lines]


def test_windows_of_a_text_are_labelled_by_their_next_tokens_and_the_last_are_held_out():
    task = texts.language(range(10 * 16 + 1), 16, 512)
    assert (task.train.tokens.shape, task.test.tokens.shape) == ((8, 16), (2, 16))
    assert task.classes is None
    together = np.concatenate([task.train.tokens, task.test.tokens])
    np.testing.assert_array_equal(together.ravel(), np.arange(160))
    labels = np.concatenate([task.train.labels, task.test.labels])
    np.testing.assert_array_equal(labels, together + 1)


def test_lines_of_a_class_are_cut_and_the_short_ones_left_out():
    lines = [" ".join([str(n)] * (20 if n % 5 else 10)) for n in range(60)]
    labels = ["even" if n % 2 == 0 else "odd" for n in range(60)]
    task = texts.classes(Words(), lines, labels, 16, 512)
    assert task.classes == ("even", "odd")
    assert task.left_out == 12
    assert task.length == 16
    for part in (task.train, task.test):
        np.testing.assert_array_equal(part.tokens[:, 0] % 2, part.labels)
    # Of each class the last fifth, which no line of the training part comes after.
    assert len(task.test.tokens) == 2 * 5
    assert task.test.tokens.min() > task.train.tokens.max() - 2
    assert texts.classes(Words(), lines, labels, None, 512).length == 20


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: texts.language([1, 2, 3], 16, 512), "3 tokens, 0 windows of 16"),
        (lambda: texts.classes(Words(), ["1"], [], 16, 512), "got 0 lines, expected 1"),
        (lambda: texts.classes(Words(), ["1"] * 9, ["a"] * 9, 16, 512), "got 1 classes"),
        (lambda: texts.classes(Words(), ["1"] * 9, list("ab" * 4 + "a"), 16, 512), "class 'a'"),
        (lambda: Settings(32, steps=0), "--steps: got 0"),
        (lambda: Settings(32, margin=0.0), "--margin: got 0.0"),
        (lambda: Settings(32, targets=("up",)), "--targets: got up, expected at least one of q"),
        (lambda: read_targets("q,w"), "--targets: got q,w"),
        (lambda: read_method("tree", 64, causal=False), "--method: got 'tree'"),
        (lambda: read_method("block tree", 64, causal=True), "for a decoder"),
        (lambda: check_features("polynomial 4", 64), "814,385 features at heads of width 64"),
    ],
)
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_features_leave_room_for_is_taken():
    check_features("polynomial 3", 64)
    check_features("block tree", 64)


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"--out: got .*out, a file, expected a folder"):
        records.resume(tmp_path / "out", {})


def test_targets_have_short_names():
    assert read_targets("q, v,up") == ("query", "value", "up")


def test_a_missing_extra_is_named_with_its_command(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["pilot", "nowhere", "--text", "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no tokenizers, orbax-checkpoint, expected pip install 'lora-limits[pilot]'" in said


# ------------------------------------------------------------------------------------- whole


@pytest.mark.slow
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys):
    extra("tokenizers")
    extra("transformers")
    folder = tiny("bert", tmp_path / "model")
    words = tmp_path / "words.txt"
    words.write_text("\n".join([TEXT * 2] * 40))
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n" * 20)
    other = tiny("gpt2", tmp_path / "other")
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "q4.gguf").touch()
    long = ["--length", "65"]
    for argv, said in (
        ([str(tmp_path / "nowhere"), "--text", str(words)], "no such folder"),
        ([str(folder), "--text", str(tmp_path / "none")], "No such file"),
        ([str(packed), "--text", str(words)], "got q4.gguf, expected safetensors"),
        ([str(folder), "--text", str(words)], "--labels: got none"),
        ([str(folder), "--text", str(words), "--labels", str(labels), *long], "16 to 64"),
        ([str(folder), "--text", str(words), "--labels", str(words)], "got 1 classes"),
        ([str(other), "--text", str(words), "--length", "16"], "model_type: got 'gpt2'"),
    ):
        assert main(["pilot", *argv, "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert told.count("error:") == 1, told
        assert said in told


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # peft and transformers deprecate each other's names
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_peft_reads_what_a_pilot_wrote_with_equal_outputs(kind, tmp_path, capsys):
    torch, transformers, peft = extra("torch"), extra("transformers"), extra("peft")
    from flax import nnx

    from lora_limits.nn import pretrained
    from lora_limits.training import loop

    folder = tiny(kind, tmp_path / "model")
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["the norm " * 8 + TEXT, "a key " * 8 + TEXT] * 20))
    argv = [str(folder), "--text", str(words), "--method", "polynomial 2", "--targets", "q,k,v,o"]
    if kind == "bert":
        (tmp_path / "labels").write_text("one\nother\n" * 20)
        argv += ["--labels", str(tmp_path / "labels")]
    sizes = ["--steps", "3", "--seeds", "1", "--batch", "2", "--length", "32", "--rate", "0.05"]
    out = tmp_path / "out"
    assert main(["pilot", *argv, *sizes, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed[:-1])) <= 80
    assert "GO: " in printed[-2]
    assert (out / "pilot.png").stat().st_size > 10_000
    assert json.loads((out / "pilot.json").read_text())["outcome"]["go"] is False

    kept = out / "adapters" / "approximate-0"
    auto = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModel
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(folder, dtype=torch.float32), kept)
    ids = np.random.default_rng(0).integers(0, 12, (2, 24))
    with torch.no_grad():
        found = theirs.eval()(input_ids=torch.as_tensor(ids))
    want = getattr(found, "logits", getattr(found, "last_hidden_state", None)).numpy()
    model = pretrained.load(folder, kept, method=loop.EXACT, rngs=nnx.Rngs(0))
    got = np.asarray(model(jnp.asarray(ids, jnp.int32)))
    np.testing.assert_allclose(got, want, atol=2e-4)
