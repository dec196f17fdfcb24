"""The gradient that is diagnosed is that of the model's own loss, as torch differentiates it."""

import numpy as np
import pytest

import lora_limits as ll
from lora_limits.diagnose import losses, recordings
from lora_limits.diagnose.layers import NAMES
from tests.diagnose.recorded import recorded
from tests.support.tiny_models import tiny
from tests.support.tools import extra

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]  # the libraries warn of their own future

FORMS = {
    "bert-masked": "projected",
    "gpt2": "projected",
    "gpt-bigcode-heads": "projected",
    "llama": "rotary",
    "gptj": "rotary",
    "gpt-neox": "rotary",
    "phi3": "rotary",
    "mistral": "rotary",
    "qwen3": "recorded",
}


def gradients_of_torch(found):
    """{path of a module: (gradient of its A, of its B)} of the task's loss, in peft's own halves."""
    modules = {
        path: module
        for path, module in found.base.named_modules()
        if getattr(module, "lora_A", None) and "lora_A" not in path
    }
    for module in modules.values():
        module.lora_A["default"].weight.requires_grad_(True)
        module.lora_B["default"].weight.requires_grad_(True)
    found.base.set_attn_implementation("eager")
    found.base(**found.task.inputs(0)).loss.backward()
    return {
        path: (
            module.lora_A["default"].weight.grad.numpy(),
            module.lora_B["default"].weight.grad.numpy(),
        )
        for path, module in modules.items()
    }


@pytest.mark.parametrize("kind", FORMS)
def test_heads_add_up_to_the_gradient_of_the_models_loss(kind, tmp_path):
    extra("torch")
    extra("peft")
    with recorded(tiny(kind, tmp_path)) as found:
        want = gradients_of_torch(found)
        for place in found.recordings.places:
            layers = found.recordings.layers(place.number)
            whole = found.projections(place.number, layers)
            parts = {
                n: (np.zeros_like(whole[n].a), np.zeros_like(whole[n].b))
                for n in NAMES
                if whole[n].a is not None
            }
            for number, head in found.heads(place.number).items():
                assert head.form == FORMS[kind]
                result = ll.gradient(head.problem, ll.Exact())
                for name, each in result.gradient.items():
                    width = (
                        head.problem.weights.query.shape[1]
                        if name != "value"
                        else head.problem.weights.value.shape[1]
                    )
                    own = number if name == "query" else layers[0].group(number)
                    order = head.columns if name != "value" else np.arange(width)
                    columns = own * width + order
                    a, b = parts[name]
                    a[:, columns] += np.asarray(each.a) / head.strength
                    b += np.asarray(each.b)[: len(b)] / head.strength
            check(place, whole, parts, want, names=("value",) if kind == "qwen3" else tuple(parts))


def check(place, whole, parts, want, names):
    for path in {place.projections[n] for n in names}:
        here = [n for n in names if place.projections[n] == path]
        want_a, want_b = want[path]
        b = sum(parts[n][1] for n in here)
        a = np.concatenate([parts[n][0] for n in here], 1)
        if whole[here[0]].columns is not None:
            a = a[:, np.argsort(np.concatenate([whole[n].columns for n in here]))]
        np.testing.assert_allclose(b.T, want_a, rtol=2e-3, atol=2e-3 * abs(want_a).max())
        np.testing.assert_allclose(a.T, want_b, rtol=2e-3, atol=2e-3 * abs(want_b).max())


@pytest.mark.parametrize(("kind", "split"), [("llama", True), ("granite", False), ("gpt2", True)])
def test_a_loss_in_pieces_is_the_loss(kind, split, tmp_path, monkeypatch):
    """Pieces of 5 of 31 tokens; Granite scales its logits, so that its own loss is taken."""
    extra("torch")
    monkeypatch.setattr(losses, "PIECE", 5)
    with recorded(tiny(kind, tmp_path)) as found:
        base, inputs = found.base, found.task.inputs(0)
        assert losses.splits(base, inputs) == split
        told = {}
        for pieces in {False, split}:
            rows = base.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
            hook = base.get_input_embeddings().register_forward_hook(lambda *_, rows=rows: rows)
            loss, back = losses.loss_and_back(base, inputs, pieces)
            back()
            hook.remove()
            told[pieces] = loss, rows.grad.numpy()
        assert told[split][0] == pytest.approx(told[False][0], rel=1e-6)
        np.testing.assert_allclose(told[split][1], told[False][1], rtol=1e-4, atol=1e-6)


def test_a_response_is_a_derivative(tmp_path, monkeypatch):
    """How much an error of all outputs changes the residuals does not hang on its size."""
    extra("torch")
    folder = tiny("llama", tmp_path)
    found = []
    for share in (0.01, 0.002):
        monkeypatch.setattr(recordings, "SHARE", share)
        with recorded(folder) as each:
            found.append(np.array(list(each.recordings.responses.values())))
    assert found[0].shape == (8,)
    assert (found[0] > 0.1).all()
    np.testing.assert_allclose(found[1], found[0], rtol=0.3)
