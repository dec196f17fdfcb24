"""The embedded real input: what the file holds, and the problems built on it."""

import jax
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import minilm

WILDEST = (0, 2)
TAMEST = (0, 7)


def test_the_file_stays_below_three_megabytes():
    assert minilm.PATH.stat().st_size < 3_000_000


def test_the_file_holds_what_its_readme_says():
    arrays = minilm.load()
    assert arrays["tokens"].shape == (512,)
    assert arrays["layers"].tolist() == [0, 2, 5]
    for layer in (0, 2, 5):
        assert arrays[f"layer{layer}_x"].shape == (512, 384)
        for name in minilm.NAMES:
            weight, bias = (
                arrays[f"layer{layer}_{name}_weight"],
                arrays[f"layer{layer}_{name}_bias"],
            )
            assert (weight.shape, bias.shape) == ((8, 384, 32), (8, 32))
            assert np.isfinite(weight).all()
    readme = minilm.PATH.with_name("README.md").read_text(encoding="utf-8")
    for layer in (0, 2, 5):
        kept = arrays[f"layer{layer}_heads"].tolist()
        ranges = arrays[f"layer{layer}_score_range"]
        assert (
            f"| {layer} | {', '.join(map(str, kept))} | {', '.join(f'{r:.1f}' for r in ranges)} |"
            in readme
        )


def test_loaded_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        minilm.load()["tokens"][0] = 1


def test_heads_run_from_tame_to_wild():
    assert len(minilm.heads()) == len(set(minilm.heads())) == 24
    for layer in (0, 2, 5):
        ranges = [minilm.score_range(*pair) for pair in minilm.heads() if pair[0] == layer]
        assert ranges == sorted(ranges)


@pytest.mark.parametrize(("layer", "head"), minilm.heads())
def test_the_recorded_score_range_is_that_of_the_rounded_head(layer, head):
    x, weights = minilm.inputs(layer, head)
    key = x @ weights["key"]
    scores = (x @ weights["query"]) @ (key - key.mean(axis=0)).T * minilm.WIDTH**-0.5
    assert np.abs(scores).max() == pytest.approx(minilm.score_range(layer, head), rel=1e-2)


@pytest.mark.parametrize(("layer", "head"), [TAMEST, WILDEST, (5, 8)])
def test_rows_of_attention_are_distributions(layer, head):
    rows = minilm.attention_rows(layer, head)
    assert rows.shape == (512, 512)
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize(("layer", "head"), [TAMEST, WILDEST])
def test_the_key_bias_cancels_in_the_softmax(layer, head):
    x, weights = minilm.inputs(layer, head, length=64)
    query = x @ weights["query"] * minilm.WIDTH**-0.5
    softmax = [
        jax.nn.softmax(query @ (x @ key).T)
        for key in (weights["key"], without_bias(weights["key"]))
    ]
    np.testing.assert_allclose(softmax[0], softmax[1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        minilm.attention_rows(layer, head, length=64), softmax[0], rtol=1e-3, atol=1e-6
    )
    # The query's does not.
    other = jax.nn.softmax(
        x @ without_bias(weights["query"]) * minilm.WIDTH**-0.5 @ (x @ weights["key"]).T
    )
    assert np.abs(other - softmax[0]).max() > 1e-3


def without_bias(weight):
    return np.vstack([weight[:-1], np.zeros_like(weight[-1:])])


def test_problem_has_the_shapes_and_sizes_it_promises():
    problem = minilm.problem(*WILDEST, rank=3, length=40)
    assert isinstance(problem, ll.LoRAProblem)
    assert problem.x_query.shape == problem.x_key.shape == problem.x_value.shape == (40, 385)
    assert problem.target.shape == (40, 32)
    np.testing.assert_array_equal(problem.x_query[:, -1], 1)
    assert set(problem.adapters) == {"query", "key", "value"}
    assert (problem.scale, problem.beta) == (1.0, 32**-0.5)
    for name, adapter in problem.adapters.items():
        assert (adapter.a.shape, adapter.b.shape) == ((3, 32), (385, 3))
        weight, update = getattr(problem.weights, name), adapter.b @ adapter.a
        assert np.linalg.norm(update) == pytest.approx(0.02 * np.linalg.norm(weight), rel=1e-4)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(problem) if hasattr(leaf, "dtype")} == {
        "float32"
    }


def test_target_is_the_frozen_output_with_a_tenth_of_noise():
    problem = minilm.problem(2, 11)
    x, weights = minilm.inputs(2, 11)
    output = minilm.attention_rows(2, 11) @ x @ weights["value"]
    noise = np.asarray(problem.target) - output
    assert np.sqrt(np.mean(noise**2) / np.mean(output**2)) == pytest.approx(0.1, rel=0.05)


def test_the_seed_alone_decides_the_draw():
    one = minilm.problem(2, 11, length=16)
    same = minilm.problem(2, 11, length=16, adapt=("value",))
    other = minilm.problem(2, 11, length=16, seed=1)
    assert set(same.adapters) == {"value"}
    np.testing.assert_array_equal(one.adapters["value"].a, same.adapters["value"].a)
    np.testing.assert_array_equal(one.target, same.target)
    assert np.abs(one.target - other.target).max() > 0


def test_float64_is_exact_or_refused():
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"dtype: got float64, expected jax\.enable_x64"),
    ):
        minilm.problem(*TAMEST, length=8, dtype="float64")
    with jax.enable_x64(True):
        problem = minilm.problem(*TAMEST, length=8, dtype="float64")
        assert problem.dtype == np.float64
        np.testing.assert_array_equal(problem.weights.query, minilm.inputs(*TAMEST)[1]["query"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 0, "head": 0}, r"\(layer, head\): got \(0, 0\)"),
        ({"layer": 1, "head": 2}, r"\(layer, head\): got \(1, 2\)"),
        ({"length": 0}, "length: got 0, expected 1 to 512"),
        ({"length": 513}, "length: got 513, expected 1 to 512"),
        ({"adapt": ("query", "output")}, r"adapt: got \['output'\]"),
        ({"rank": 0}, "rank: got 0"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        minilm.problem(**{"layer": 0, "head": 2} | arguments)
