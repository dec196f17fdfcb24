"""Every architecture that people ask for: right, or refused by name; never silently wrong."""

import pytest

from lora_limits.cli import main
from lora_limits.diagnose.heads import Head
from tests.diagnose.recorded import recorded
from tests.support.tiny_models import MODELS, TEXT, tiny
from tests.support.tools import extra

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the libraries warn of their own future

ALL, SOME = "query key value", "query value"
# kind: (form, adapters with a gradient, the sliding window) of every head; a fused projection has
# all three adapters
RIGHT = {
    "bert": ("projected", SOME, None),
    "bert-masked": ("projected", SOME, None),
    "roberta": ("projected", SOME, None),
    "distilbert": ("projected", SOME, None),
    "electra": ("projected", SOME, None),
    "gpt2": ("projected", ALL, None),
    "gpt-bigcode": ("projected", ALL, None),
    "gpt-bigcode-heads": ("projected", ALL, None),
    "opt": ("projected", SOME, None),
    "bart": ("projected", SOME, None),
    "gptj": ("rotary", SOME, None),
    "codegen": ("rotary", ALL, None),
    "gpt-neox": ("rotary", ALL, None),
    "llama": ("rotary", SOME, None),
    "mistral": ("rotary", SOME, 8),
    "qwen2": ("rotary", SOME, None),
    "gemma": ("rotary", SOME, None),
    "phi": ("rotary", SOME, None),
    "phi3": ("rotary", ALL, None),
    "starcoder2": ("rotary", SOME, None),
    "cohere": ("rotary", SOME, None),
    "granite": ("rotary", SOME, None),
    "glm": ("rotary", SOME, None),
    "smollm3": ("rotary", SOME, None),
    "qwen3": ("recorded", "value", None),
    "olmo2": ("recorded", "value", None),
}
# kind: what is said of every head of it
REFUSED = {
    "albert": "its weights run 2 times in a pass",
    "mpnet": "MPNetSelfAttention does not go through",
    "falcon": "FalconAttention does not go through",
    "bloom": "BloomAttention does not go through",
    "mpt": "MptAttention does not go through",
    "gemma2": "caps its scores (softcap)",
    "gpt-oss": "has attention sinks (s_aux)",
}
# kind: what is said of the model
UNREAD = {
    "deberta": "DebertaV2ForMaskedLM: got no attention projections",
    "vit": "ViTModel: got a model that reads pixel_values",
    "dinov2": "Dinov2Model: got a model that reads pixel_values",
    "wav2vec2": "Wav2Vec2Model: got a model that reads input_values",
    "clip": "CLIPModel: got a model with a vision_config",
}


@pytest.fixture
def folder(request, tmp_path):
    extra("torch")
    extra("peft")
    return tiny(request.param, tmp_path)


def each(kinds):
    return pytest.mark.parametrize(
        ("folder", "kind"), [(kind, kind) for kind in kinds], indirect=["folder"]
    )


@each(RIGHT)
def test_every_head_is_rebuilt_with_what_its_positions_allow(folder, kind):
    form, adapted, window = RIGHT[kind]
    with recorded(folder) as found:
        assert list(found.recordings.counts.values()) == [4, 4]
        for number in found.recordings.counts:
            for head in found.heads(number).values():
                assert isinstance(head, Head), head
                assert (head.form, " ".join(head.adapted)) == (form, adapted)
                assert head.problem.window == window
                assert head.problem.causal == ("bert" not in kind and kind != "electra")


@each(REFUSED)
def test_what_attends_otherwise_is_refused_by_name(folder, kind):
    with recorded(folder) as found:
        said = [why for n in found.recordings.counts for why in found.heads(n).values()]
        assert said
        assert all(REFUSED[kind] in why for why in said), said


@each(UNREAD)
def test_what_cannot_be_read_is_refused_by_name(folder, kind, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    assert main(["diagnose", str(folder), "--text", str(text), "--length", "16"]) == 2
    assert UNREAD[kind] in capsys.readouterr().err.splitlines()[-1]


@each(["modernbert", "gemma3"])
def test_layers_are_each_of_their_own_kind(folder, kind):
    with recorded(folder) as found:
        heads = [found.heads(number)[0] for number in found.recordings.counts]
        if kind == "modernbert":
            assert heads[0].form == "rotary"
            assert heads[0].adapted == ("query", "key", "value")
            assert all("a window of keys on both sides" in why for why in heads[1:])
        else:
            assert [head.problem.window for head in heads] == [8] * 5 + [None]
    # where the window reaches over all tokens there is none
    if kind == "modernbert":
        with recorded(folder, length=16) as found:
            why = {
                str(h)
                for n in found.recordings.counts
                for h in found.heads(n).values()
                if isinstance(h, str)
            }
            assert all("both sides" in said for said in why)


def test_a_decoder_taken_out_of_its_pair_counts_only_what_runs(tmp_path):
    extra("torch")
    with recorded(tiny("bart", tmp_path)) as found:
        paths = [place.path for place in found.recordings.places]
        assert len(paths) == 2
        assert not any("encoder_attn" in path for path in paths)


def test_twenty_five_architectures_are_tried():
    tried = {*RIGHT, *REFUSED, *UNREAD, "modernbert", "gemma3"}
    assert tried <= set(MODELS)
    assert len(tried) >= 25
