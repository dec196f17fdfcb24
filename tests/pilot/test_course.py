"""A whole pilot of tiny models: both sides on the same data, kept, killed and resumed."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_limits as ll
from lora_limits.nn import adapter_files, pretrained
from lora_limits.pilot import choosing, models, records, report
from lora_limits.pilot import settings as asking
from lora_limits.pilot.course import Pilot
from lora_limits.pilot.settings import Settings
from lora_limits.pilot.texts import Task
from lora_limits.training import loop
from lora_limits.training.batches import Data
from tests.nn.test_bert import CONFIG, SHAPES
from tests.support import plain_llama
from tests.support.tools import later

LENGTH = 32
SETTINGS = Settings(LENGTH, batch=2, steps=4, seeds=2, rank=2, rate=0.05, method="polynomial 2")


@pytest.fixture(scope="module", autouse=True)
def one_layout():
    """The fastest of the exact layouts is another each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "exact", lambda length, rows: {"exact": ll.Exact(512)})
        patch.setattr(choosing, "REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """(folder of a tiny Llama, its task): the token after next is the one before."""
    folder = plain_llama.write(tmp_path_factory.mktemp("llama"), {"max_position_embeddings": 64})
    drawn = np.random.default_rng(0).integers(0, 11, (16, 2)).astype(np.int32)
    rows = np.tile(drawn, (1, LENGTH // 2 + 1))[:, : LENGTH + 1]
    train, test = (Data(r[:, :-1], r[:, 1:]) for r in (rows[:12], rows[12:]))
    return folder, Task(train, test)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """(folder of a tiny BERT, its task): which of two tokens is the frequent one."""
    folder = tmp_path_factory.mktemp("bert")
    rng = np.random.default_rng(0)
    arrays = {f"{n}.weight": rng.normal(size=s).astype("f4") for n, s in SHAPES.items()}
    arrays["embeddings.position_embeddings.weight"] = rng.normal(size=(64, 6)).astype("f4")
    arrays |= {
        f"{n}.bias": rng.normal(size=s[0]).astype("f4")
        for n, s in SHAPES.items()
        if not n.endswith("_embeddings")
    }
    save_file(arrays, folder / "model.safetensors")
    config = CONFIG | {"max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    labels = np.arange(16, dtype=np.int32) % 2
    tokens = np.where(rng.random((16, LENGTH)) < 0.7, labels[:, None], rng.integers(2, 7))
    data = Data(tokens.astype(np.int32), labels)
    return folder, Task(
        *(Data(*(x[cut] for x in data)) for cut in (slice(8), slice(8, 16))), ("a", "b")
    )


def run(case, out, settings=SETTINGS, say=lambda *_: None):
    folder, task = case
    classes = None if task.classes is None else len(task.classes)
    load = partial(models.load, folder, settings.lora, classes, loop.EXACT)
    asked = {"model": folder.name, **vars(settings)}
    return Pilot(load, task, settings, asked, out, say).run()


@pytest.fixture(scope="module")
def whole(decoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return run(decoder, out), out


def learnt(state):
    """What does not hang on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "temporary")} for row in state["runs"]
    ]


def test_both_sides_start_alike_see_the_same_data_and_learn(whole):
    state, _ = whole
    exact, other = state["runs"][:2]
    assert (exact["side"], other["side"]) == ("exact", "approximate")
    # The same adapters and the same batches: B = 0 at the start, so that the loss is the base's.
    assert exact["test_loss"][0] == pytest.approx(other["test_loss"][0], abs=0.3)
    assert exact["loss"] != other["loss"]
    outcome = state["outcome"]
    assert outcome["exact"] < outcome["start"]
    assert len(exact["final"]["loss"]) == 4
    assert outcome["worse"]["low"] < outcome["worse"]["mean"] < outcome["worse"]["high"]


def test_a_killed_pilot_goes_on_to_the_same_numbers(decoder, whole, tmp_path):
    """Killed in the second run between two evaluations, and before that in the first."""

    def killer(at):
        def say(done, total, said):
            if done == at and "loss" in said:
                raise KeyboardInterrupt

        return say

    for at in (3, 4 + 3):
        with pytest.raises(KeyboardInterrupt):
            run(decoder, tmp_path, say=killer(at))
    assert len(records.resume(tmp_path, {})["runs"]) == 1
    resumed = run(decoder, tmp_path)
    assert learnt(resumed) == learnt(whole[0])
    for part in ("worse", "start", "exact", "approximate", "stop"):
        assert resumed["outcome"][part] == whole[0]["outcome"][part]
    again = run(decoder, tmp_path)
    assert json.dumps(again) == json.dumps(resumed)


def test_the_adapters_kept_are_those_that_were_scored(decoder, whole):
    folder, task = decoder
    state, out = whole
    kept = out / "adapters" / "approximate-1"
    model = pretrained.load(folder, kept, method=loop.EXACT, rngs=models.nnx.Rngs(9))
    found = loop.scores(model, task.test, loop.Recipe(1, batch=2))
    row = next(r for r in state["runs"] if (r["side"], r["seed"]) == ("approximate", 1))
    np.testing.assert_allclose(found["loss"], row["final"]["loss"], rtol=1e-5)
    assert load_file(kept / adapter_files.WEIGHTS)


def test_a_folder_of_another_pilot_is_refused(decoder, whole):
    with pytest.raises(ValueError, match=r"a pilot of steps 4, expected 5, or another --out"):
        run(decoder, whole[1], Settings(**{**vars(SETTINGS), "steps": 5}))


def test_more_features_than_fit_are_refused_before_anything_is_timed(decoder, tmp_path):
    asked = Settings(**{**vars(SETTINGS), "method": "polynomial 900"})
    with pytest.raises(ValueError, match=r"--method: got 'polynomial 900', [\d,]+ features"):
        run(decoder, tmp_path, asked)


def test_ten_lines_of_eighty_columns(whole):
    told = report.lines(whole[0], SETTINGS)
    assert len(told) <= 10
    assert max(map(len, told)) <= 80
    assert told[-1].startswith(("GO: ", "NO-GO: "))


@pytest.mark.parametrize("method", ["polynomial 2", *later("block tree")])
def test_an_encoder_learns_classes_and_its_classifier_lies_beside_the_adapters(
    encoder, tmp_path, method
):
    settings = Settings(**{**vars(SETTINGS), "method": method, "seeds": 1, "steps": 2})
    state = run(encoder, tmp_path, settings)
    assert state["outcome"]["metric"] == "accuracy"
    assert set(state["runs"][0]["final"]["accuracy"]) <= {0.0, 1.0}
    kept = load_file(tmp_path / "adapters" / "exact-0" / models.CLASSIFIER)
    assert {name: x.shape for name, x in kept.items()} == {"weight": (2, 6), "bias": (2,)}
    fresh = models.load(encoder[0], settings.lora, 2, loop.EXACT, 0)
    assert np.abs(kept["weight"] - np.asarray(fresh.classifier.kernel[...]).T).max() > 1e-3


def test_where_exact_is_fastest_nothing_is_trained(decoder, tmp_path, monkeypatch):
    """One layer's polynomial costs more than exact attention at 32 tokens, or errs too much."""
    settings = Settings(**{**vars(SETTINGS), "method": None})
    monkeypatch.setattr(choosing, "SHARE", 0.0)
    state = run(decoder, tmp_path, settings)
    assert "runs" not in state
    assert not state["outcome"]["go"]
    told = report.lines(state, settings)
    assert max(map(len, told)) <= 80
    assert "of the noise" in told[-2]
    assert told[-1].startswith("NO-GO: in no layer")


@pytest.mark.parametrize(
    ("length", "count"), [(16, 8), (1024, 8), (2048, 4), (4096, 2), (8192, 2), (16384, 2)]
)
def test_fewer_of_long_sequences_are_watched_but_never_one(length, count):
    tokens = np.zeros((9, length), np.int32)
    assert len(choosing.first_of(Data(tokens, tokens)).tokens) == count


def test_errors_and_noise_are_those_of_whole_gradients(decoder):
    """Layer by layer and as a whole, against gradients of the batch, taken another way."""
    folder, task = decoder
    model = models.load(folder, SETTINGS.lora, None, loop.EXACT, 0)
    data = Data(*(x[:4] for x in task.train))
    exact = {"exact": ll.Exact(512)}
    approximate = {"polynomial 2": ll.Polynomial(2, block_size=8)}
    choice = choosing.choose(model, data, 2, exact, approximate, "polynomial 2")
    split = models.nnx.split(model, loop.ADAPTERS, ...)
    singles = [loop.gradients(*split, *(x[n : n + 1] for x in data)) for n in range(4)]
    for n, layer in enumerate(choice["layers"]):
        rows = np.stack([flat(g, n) for g in singles])
        size = np.linalg.norm(rows[:2].mean(0))
        noise = np.sqrt(rows.var(0, ddof=1).sum() / 2) / size
        assert layer["noise"] == pytest.approx(noise, rel=1e-4)
        assert layer["errors"]["polynomial 2"] > 1e-3
    same = choosing.watched(model, ll.Exact(512), data, 2)
    assert same["error"] == pytest.approx(0, abs=1e-6)
    model.set_methods([approximate["polynomial 2"]] * 2)
    found = choosing.watched(model, ll.Exact(512), data, 2)
    assert found["noise"] == pytest.approx(same["noise"], rel=1e-5)
    assert found["error"] > 1e-3


def flat(gradient, layer):
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return np.concatenate(
        [np.ravel(x) for path, x in leaves if f"['blocks'][{layer}]" in jax.tree_util.keystr(path)]
    )
