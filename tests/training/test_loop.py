"""The training loop against a plain one, killed and resumed, and the batches that it is fed with."""

from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import lora_limits as ll
from lora_limits.training import batches, loop
from lora_limits.training.batches import Data
from lora_limits.training.loop import Recipe
from tests.support.plain_transformer import average, logits, make
from tests.support.tools import quick_jit


class Halves(NamedTuple):
    """All that the loop asks of a task."""

    train: Data
    test: Data


@pytest.fixture(scope="module")
def task():
    """Sequences of 8 tokens, and whether the first comes again."""
    drawn = np.random.default_rng(0).integers(0, 7, (64, 8)).astype(np.int32)
    labels = (drawn[:, 1:] == drawn[:, :1]).any(1).astype(np.int32)
    return Halves(Data(drawn[:48], labels[:48]), Data(drawn[48:], labels[48:]))


RECIPE = Recipe(steps=6, batch=4, rate=0.05, every=2, tests=8)


def params(model):
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(nnx.state(model))
    }


def test_training_with_exact_is_a_plain_optax_loop_on_the_plain_definition(task):
    """Losses of every step, and the adapters at the end; softmax written out, adapters as W + s B
    A.
    """
    model, other = make(2), make(2)
    shape, state = other.shape, nnx.state(other)
    history = loop.train(model, task, RECIPE)

    def loss(adapters, rest, data):
        p = nnx.to_pure_dict(nnx.merge_state(adapters, rest))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(p, data.tokens, shape, 1.5), data.labels
        ).mean()

    adapters, rest = nnx.split_state(state, nnx.LoRAParam, ...)
    optimiser = loop.optimiser(RECIPE)
    moments, losses = optimiser.init(adapters), []

    @quick_jit
    def advance(adapters, moments, data):
        value, grads = jax.value_and_grad(loss)(adapters, rest, data)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimiser.update(grads, moments, adapters)
        return optax.apply_updates(adapters, updates), moments, value

    for step in range(RECIPE.steps):
        data = batches.batch(task.train, RECIPE.batch, RECIPE.seed, step)
        adapters, moments, value = advance(adapters, moments, data)
        losses.append(float(value))
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-10)
    for got, want in zip(
        jax.tree.leaves(nnx.state(model, nnx.LoRAParam)), jax.tree.leaves(adapters), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-9)


def test_a_killed_run_goes_on_to_the_same_losses(task, tmp_path, monkeypatch):
    """Killed between two evaluations, and asked again when it is over; methods change on the
    way.
    """
    ladder = [ll.Exact(), ll.Exact(5)]

    def run(folder):
        model = make(2)

        def rechoose(model, data):
            return [ladder[data.tokens.sum() % 2]]

        history = loop.train(model, task, RECIPE, rechoose=rechoose, folder=folder)
        return {k: v for k, v in history.items() if k not in ("seconds", "temporary")}, params(
            model
        )

    whole = run(None)
    batch, calls = batches.batch, iter([False] * 5 + [True])

    def killing(*args):
        if next(calls):
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(batches, "batch", killing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.setattr(batches, "batch", batch)
    for resumed in (run(tmp_path / "run"), run(tmp_path / "run")):
        assert resumed[0] == whole[0]
        assert all((resumed[1][name] == x).all() for name, x in whole[1].items())


def test_only_the_adapters_change_in_fine_tuning_and_only_the_base_before(task):
    for what, changes in ((loop.ADAPTERS, True), (loop.BASE, False)):
        model = make(2)
        before = params(model)
        loop.train(model, task, RECIPE, what=what)
        for name, x in params(model).items():
            is_adapter = name.split("'")[-2] in ("a", "b")
            assert (x != before[name]).any() == (is_adapter == changes), name


def test_a_step_compiles_once_for_each_tuple_of_methods(task):
    """Methods change at every evaluation, to and fro."""
    loop._compiled.clear()
    turns = iter([[ll.Exact()], [ll.Exact(5)]] * 2)
    history = loop.train(make(2), task, RECIPE, rechoose=lambda *_: next(turns))
    assert history["methods"] == [["Exact(block_size=None)"], ["Exact(block_size=5)"]] * 2
    assert len(loop._compiled) == 2
    loop.train(make(2), task, RECIPE)
    assert len(loop._compiled) == 2


def test_a_gradient_by_the_exact_method_compares_as_equal_and_another_by_its_distance(task):
    model = make(2)
    data = batches.batch(task.train, 4, 0, 0)
    model.set_methods([loop.EXACT])
    assert loop.compare(model, data)["error"] < 1e-12
    model.set_methods([average])
    result = loop.compare(model, data)
    parts = [
        np.concatenate(
            [
                np.ravel(x)
                for x in jax.tree.leaves(loop.gradients(*nnx.split(m, nnx.LoRAParam, ...), *data))
            ]
        )
        for m in (model, loop.with_methods(model, [loop.EXACT]))
    ]
    assert result["error"] == pytest.approx(
        np.linalg.norm(parts[0] - parts[1]) / np.linalg.norm(parts[1])
    )
    assert 1 - result["cosine"] <= result["error"] ** 2
    assert result["error"] > 1e-3


def test_a_batch_is_a_function_of_seed_and_step(task):
    same, again, later, other = (
        batches.batch(task.train, 8, *s).tokens for s in ((0, 3), (0, 3), (0, 4), (1, 3))
    )
    assert (same == again).all()
    assert (same != later).any()
    assert (same != other).any()
