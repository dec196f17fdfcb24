"""`lora-limits diagnose` without its extra: heads from recordings, or why there is none."""

import dataclasses

import numpy as np
import pytest

import lora_limits as ll
from lora_limits.diagnose import heads, outputs, positions
from lora_limits.diagnose.layers import NAMES, Mask, read_mask
from lora_limits.diagnose.projections import join
from lora_limits.instruments.comparing import softmax
from lora_limits.problem import projections
from tests.diagnose.made_up import (
    CAUSAL,
    D_MODEL,
    GROUPS,
    HEADS,
    WIDTH,
    normalised,
    recording,
    rotated,
)


@pytest.mark.parametrize("head", range(HEADS))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 0.7, "mask": CAUSAL},
        {"adapted": ("value",)},
        {"turn": rotated, "mask": Mask(5, 0)},
    ],
)
def test_a_problem_has_the_queries_keys_and_values_of_its_head(head, options):
    layer, whole = recording(**options)
    heads.check_rebuilt(layer, head)
    made = heads.make_head(layer, whole, head)
    q, k, v = projections(made.problem)
    group = head // (HEADS // GROUPS)
    scores = layer.query[head] @ layer.key[group].T
    np.testing.assert_allclose(q @ k.T * made.problem.beta / 0.4, scores, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(v, layer.value[group], rtol=1e-4, atol=1e-4)
    mask = options.get("mask", Mask())
    assert made.form == ("rotary" if "turn" in options else "projected")
    assert (made.problem.causal, made.problem.window) == (mask.causal, 6 if mask.window else None)
    assert made.adapted == tuple(options.get("adapted", NAMES))
    assert made.without == {}
    own = layer.output[:, head * WIDTH : (head + 1) * WIDTH]
    np.testing.assert_allclose(outputs.output(made.problem), own, rtol=1e-3, atol=1e-3)


def test_normalised_heads_keep_the_value_adapter_and_name_the_others():
    layer, whole = recording(turn=normalised)
    made = heads.make_head(layer, whole, 2)
    assert (made.form, made.adapted, set(made.without)) == (
        "recorded",
        ("value",),
        {"query", "key"},
    )
    np.testing.assert_allclose(projections(made.problem)[0], layer.query[2], rtol=1e-6)
    assert made.update["query"] > 0
    layer, whole = recording(turn=normalised, adapted=("query",))
    made = heads.make_head(layer, whole, 2)
    assert made.adapted == ()
    assert not np.asarray(made.problem.adapters["value"].a).any()


def test_the_target_is_the_output_less_the_gradient_of_the_task():
    layer, whole = recording(residual=True)
    made = heads.make_head(layer, whole, 1, response=4.0)
    own = layer.output[:, WIDTH : 2 * WIDTH]
    told = made.strength * layer.residual[1]
    np.testing.assert_allclose(made.problem.target, own - told, rtol=1e-4, atol=1e-4)
    # an output that is wrong by 1 % changes the residual by 4 %
    assert np.linalg.norm(own) == pytest.approx(4 * np.linalg.norm(told), rel=1e-4)
    again = heads.make_head(layer, whole, 1, response=4.0, strength=2.0)
    np.testing.assert_allclose(again.problem.target, own - 2 * layer.residual[1], atol=1e-4)
    layer.residual[1][:] = 0
    with pytest.raises(heads.Refused, match="no gradient for its output"):
        heads.make_head(layer, whole, 1)


def test_the_stand_in_is_the_frozen_output_and_a_tenth_of_noise():
    layer, whole = recording()
    made = heads.make_head(layer, whole, 0, seed=3)
    assert made.strength is None
    q, k, v = (
        np.asarray(x) for x in projections(dataclasses.replace(made.problem, scale=np.float32(0)))
    )
    output = softmax(0.4 * q @ k.T) @ v
    noise = np.asarray(made.problem.target) - output
    assert np.sqrt(np.mean(noise**2) / np.mean(output**2)) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.output.__imul__(1.01), "away from the model's own output"),
        (lambda layer: setattr(layer, "mask", None), "hides more than a band"),
        (lambda layer: setattr(layer, "mask", CAUSAL), "away from the model's own output"),
        (lambda layer: setattr(layer, "special", "caps its scores"), "caps its scores"),
        (lambda layer: setattr(layer, "output", None), "no output projection"),
        (lambda layer: setattr(layer, "output", layer.output[:, 1:]), "its output has shape"),
    ],
)
def test_what_does_not_rebuild_the_model_is_refused(change, reason):
    layer, _ = recording()
    heads.check_rebuilt(layer, 1)
    change(layer)
    with pytest.raises(heads.Refused, match=reason):
        heads.check_rebuilt(layer, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.x.update(value=2 * layer.x["value"]), "not a projection of its input"),
        (lambda layer: setattr(layer, "mask", Mask(3, 3)), "a window of keys on both sides"),
    ],
)
def test_what_no_problem_says_is_refused(change, reason):
    layer, whole = recording()
    change(layer)
    with pytest.raises(heads.Refused, match=reason):
        heads.make_head(layer, whole, 1)


def test_masks_are_bands_or_nothing():
    tokens = np.arange(8)
    for mask in (Mask(), CAUSAL, Mask(2, 0), Mask(2, 3), Mask(None, 3)):
        assert read_mask(~mask.visible(tokens, 8)) == mask
    padded = ~Mask().visible(tokens, 8)
    padded[:, 6:] = True
    assert read_mask(padded) is None


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("turned", [4, 8])
def test_rotary_positions_are_found_from_what_they_do(neighbours, turned):
    random = np.random.default_rng(0)
    angles = np.arange(40)[:, None] * 10.0 ** -np.arange(turned // 2)
    order = np.arange(turned)
    if neighbours:
        order = np.concatenate([order[::2], order[1::2]])
    columns = np.concatenate([order, np.arange(turned, 8)])
    before = [random.standard_normal((40, 8)) for _ in range(2)]
    after = [np.zeros((40, 8)) for _ in range(2)]
    for y, z, factor in zip(before, after, (0.5, 2.0), strict=True):
        z[:, columns] = factor * positions.turn(y[:, columns], angles)
    pairs = list(zip(before, after, strict=True))
    found = positions.find_rotary(*pairs, close=1e-6)
    assert (found.query_factor, found.key_factor) == pytest.approx((0.5, 2.0))
    turned_query = 0.5 * positions.turn(before[0][:, found.columns], found.angles)
    np.testing.assert_allclose(turned_query, after[0][:, found.columns], atol=1e-9)
    assert positions.find_rotary(pairs[0], (before[1], before[1] ** 2), close=1e-3) is None


def test_adapters_of_different_scales_are_folded_into_one():
    layer, whole = recording(adapted=("query", "value"))
    value = dataclasses.replace(whole["value"], scale=1.0, b=whole["value"].b / 2)
    same, other = (
        heads.make_head(layer, parts, 1).problem for parts in (whole, whole | {"value": value})
    )
    np.testing.assert_allclose(projections(other)[2], projections(same)[2], rtol=1e-5, atol=1e-5)
    ratio = np.asarray(other.adapters["value"].a) / np.asarray(same.adapters["value"].a)
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-6)


def test_heads_join_to_the_adapter_of_their_projection():
    layer, whole = recording()
    parts = [heads.make_head(layer, whole, h).problem.adapters["query"] for h in range(HEADS)]
    joined = join(parts, D_MODEL)
    np.testing.assert_array_equal(joined.a, whole["query"].a)
    np.testing.assert_array_equal(joined.b, whole["query"].b)
    with pytest.raises(ValueError, match="update of the bias"):
        join([ll.Adapter(parts[0].a, parts[0].b + 1)], D_MODEL)
    with pytest.raises(ValueError, match="different b"):
        join([parts[0], ll.Adapter(parts[1].a, 2 * parts[1].b)], D_MODEL)
