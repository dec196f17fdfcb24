"""`lora-limits diagnose` without its extra: heads from recordings, and what is measured on them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import lora_limits as ll
from lora_limits.diagnose import altered, errors, heads, methods, times
from lora_limits.diagnose.activations import NAMES, Layer
from lora_limits.diagnose.adapters import Projection, join
from lora_limits.instruments.comparing import softmax
from lora_limits.problem import projections
from tests.support.tools import later

LENGTH, D_MODEL, HEADS, GROUPS, WIDTH, RANK = 24, 10, 4, 2, 3, 2


def recording(*, factor=1.0, mask="full", turn=False, adapted=NAMES, scale=0.5):
    """A layer as the hooks would leave it, four heads on two key heads, and its projections."""
    random = np.random.default_rng(0)
    x = random.standard_normal((LENGTH, D_MODEL)).astype(np.float32)
    whole, rows = {}, {}
    for name in NAMES:
        count = HEADS if name == "query" else GROUPS
        shapes = (
            (D_MODEL, count * WIDTH),
            (count * WIDTH,),
            (D_MODEL, RANK),
            (RANK, count * WIDTH),
        )
        w, bias, b, a = (random.standard_normal(s).astype(np.float32) for s in shapes)
        b, a = (b, a) if name in adapted else (None, None)
        whole[name] = Projection(w, bias, b, a, scale)
        y = x @ w + bias + (0 if b is None else scale * x @ b @ a)
        rows[name] = y.reshape(LENGTH, count, WIDTH).transpose(1, 0, 2)
    rows["query"] = factor * rows["query"]
    if turn:  # a rotation that depends on the position, as rotary models have
        angle = np.arange(LENGTH)[None, :] * 0.3
        for name in ("query", "key"):
            u, v = rows[name][..., 0].copy(), rows[name][..., 1].copy()
            rows[name][..., 0], rows[name][..., 1] = (
                np.cos(angle) * u - np.sin(angle) * v,
                np.sin(angle) * u + np.cos(angle) * v,
            )
    layer = Layer(
        "layer", {}, False, "out", dict.fromkeys(NAMES, x), **rows, mask=mask, scaling=0.4
    )
    scores = 0.4 * rows["query"] @ np.repeat(rows["key"], HEADS // GROUPS, 0).transpose(0, 2, 1)
    scores = (
        np.where(np.tri(LENGTH, dtype=bool)[None], scores, -1e30) if mask == "causal" else scores
    )
    f = np.exp(scores - scores.max(-1, keepdims=True))
    output = (f / f.sum(-1, keepdims=True)) @ np.repeat(rows["value"], HEADS // GROUPS, 0)
    layer.output = output.transpose(1, 0, 2).reshape(LENGTH, -1)
    return layer, whole


@pytest.mark.parametrize("head", range(HEADS))
@pytest.mark.parametrize(
    "options", [{}, {"factor": 0.7, "mask": "causal"}, {"adapted": ("value",)}]
)
def test_a_problem_has_the_queries_keys_and_values_of_its_head(head, options):
    layer, whole = recording(**options)
    made = heads.make_head(layer, whole, head)
    q, k, v = projections(made.problem)
    group = head // (HEADS // GROUPS)
    np.testing.assert_allclose(
        options.get("factor", 1.0) * q, layer.query[head], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(k, layer.key[group], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(v, layer.value[group], rtol=1e-4, atol=1e-4)
    assert float(made.problem.beta) == pytest.approx(0.4 * options.get("factor", 1.0), rel=1e-5)
    assert (made.form, made.causal) == ("projected", options.get("mask") == "causal")
    assert made.adapted == tuple(options.get("adapted", NAMES))
    assert made.without == {}


def test_rotated_heads_keep_the_value_adapter_and_name_the_others():
    layer, whole = recording(turn=True)
    made = heads.make_head(layer, whole, 2)
    assert (made.form, made.adapted, set(made.without)) == ("rotated", ("value",), {"query", "key"})
    np.testing.assert_allclose(projections(made.problem)[0], layer.query[2], rtol=1e-6)
    assert made.update["query"] > 0
    layer, whole = recording(turn=True, adapted=("query",))
    made = heads.make_head(layer, whole, 2)
    assert made.adapted == ()
    assert not np.asarray(made.problem.adapters["value"].a).any()


def test_the_target_is_the_frozen_output_and_a_tenth_of_noise():
    layer, whole = recording()
    with_adapters = heads.make_head(layer, whole, 0, seed=3).problem
    q, k, v = (
        np.asarray(x) for x in projections(dataclasses.replace(with_adapters, scale=np.float32(0)))
    )
    output = softmax(0.4 * q @ k.T) @ v
    noise = np.asarray(with_adapters.target) - output
    assert np.sqrt(np.mean(noise**2) / np.mean(output**2)) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.output.__imul__(1.01), "away from the model's own output"),
        (lambda layer: setattr(layer, "mask", "other"), "neither full nor causal"),
        (lambda layer: setattr(layer, "mask", "causal"), "away from the model's own output"),
        (lambda layer: setattr(layer, "query", None), "attention interface"),
        (lambda layer: setattr(layer, "output", None), "no output projection"),
        (lambda layer: layer.x.update(value=2 * layer.x["value"]), "not a projection of its input"),
    ],
)
def test_what_does_not_rebuild_the_model_is_refused(change, reason):
    layer, whole = recording()
    change(layer)
    with pytest.raises(heads.Refused, match=reason):
        heads.make_head(layer, whole, 1)


def test_adapters_of_different_scales_are_refused():
    layer, whole = recording(adapted=("query", "value"))
    value = dataclasses.replace(whole["value"], scale=1.0, b=whole["value"].b / 2)
    with pytest.raises(heads.Refused, match="different scales"):
        heads.make_head(layer, whole | {"value": value}, 1)


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


def test_the_error_is_the_largest_relative_frobenius_one():
    exact = {
        "query.a": np.array([[3.0, 4.0]]),
        "query.b": np.array([[1.0]]),
        "value.a": np.zeros((1, 1)),
    }
    assert errors.error(exact, exact) == 0
    assert errors.error(exact | {"query.a": np.array([[3.0, 5.0]])}, exact) == pytest.approx(0.2)
    assert errors.error(exact | {"value.a": np.ones((1, 1))}, exact) == np.inf
    assert errors.error(exact | {"query.b": np.array([[np.nan]])}, exact) == np.inf


def test_noise_is_the_spread_over_the_root_mean_square():
    random = np.random.default_rng(0)
    mean, spread = random.standard_normal(4000), 0.5 * random.standard_normal((8, 4000))
    assert errors.noise([{"a": mean + s} for s in spread]) == pytest.approx(
        0.5 / np.sqrt(1.25), rel=0.02
    )
    assert errors.noise([{"a": mean}]) is None


def test_the_climb_stops_at_the_first_success_of_each_family(monkeypatch):
    """Polynomial(2) fails on the windows laid end to end, Skeleton(4) pays now and is not asked,
    Skeleton(2) is NaN.
    """
    rungs = {
        "Polynomial": tuple(ll.Polynomial(g) for g in (1, 2, 3, 4)),
        "Skeleton": (ll.Skeleton(2), ll.Skeleton(4)),
    }
    off = dict(
        zip(
            [*rungs["Polynomial"], *rungs["Skeleton"]],
            (3.0, 1.1, 1.1, 1.0, np.nan, 1.1),
            strict=True,
        )
    )
    pays = SimpleNamespace(
        pays_from=lambda problem, method: 99 if isinstance(method, ll.Polynomial) else LENGTH
    )
    monkeypatch.setattr(methods, "ladder", lambda width, length: rungs)
    monkeypatch.setattr(
        methods, "arrays", lambda problem, method: ({"a": problem.gradients[method]}, 7)
    )
    monkeypatch.setattr(methods, "exact_arrays", lambda problem: {"a": np.array(1.0)})
    problem = heads.make_head(*recording(), 0).problem
    window = SimpleNamespace(weights=problem.weights, x_query=problem.x_query, gradients=off)
    long = SimpleNamespace(gradients=off | {ll.Polynomial(2): 1.3})
    monkeypatch.setattr(methods, "laid_end_to_end", lambda problems: long)
    tried = methods.climb([window] * 2, [{"a": np.array(1.0)}] * 2, 0.2, pays)
    near = pytest.approx
    assert [
        (methods.label(t["method"]), t["error"], t["error_longer"], t["within"], t["pays_from"])
        for t in tried
    ] == [
        ("Polynomial(1)", 2.0, None, False, None),
        ("Polynomial(2)", near(0.1), near(0.3), False, 99),
        ("Polynomial(3)", near(0.1), near(0.1), True, 99),
        ("Skeleton(2)", np.inf, None, False, None),
        ("Skeleton(4)", near(0.1), None, True, LENGTH),
    ]
    assert methods.climb([window], [{"a": np.array(1.0)}], 0.2, pays)[-2]["error_longer"] is None


def test_windows_laid_end_to_end_are_one_text_with_their_own_noise():
    problems = [heads.make_head(*recording(), 0, seed=seed).problem for seed in (1, 2)]
    long = altered.laid_end_to_end(problems)
    assert long.x_key.shape[0] == long.target.shape[0] == 2 * LENGTH
    np.testing.assert_array_equal(long.x_value[LENGTH:], problems[1].x_value)
    # the same text twice: attention over both is attention over one, so output and noise stay what
    # they are
    both = np.concatenate([p.target for p in problems])
    np.testing.assert_allclose(long.target, both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [4096, *later(8192)])
def test_adapters_that_add_nothing_are_no_constants_of_a_program(tokens):
    """XLA's CPU compiler makes NaN of them at these lengths: the frozen head's own target is the
    same again, to rounding.
    """
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(tokens, 384)), np.float32)
    w = np.asarray(rng.normal(size=(384, 4)) / 20, np.float32)
    a = np.asarray(rng.normal(size=(2, 4)), np.float32)
    adapter = ll.Adapter(a, np.asarray(rng.normal(size=(384, 2)) / 20, np.float32))
    problem = ll.LoRAProblem(
        x,
        x,
        x,
        x[:, :4],
        weights=ll.AttentionWeights(w, w, w),
        adapters={"query": adapter, "value": adapter},
        scale=1.0,
        beta=0.5,
    )
    cool = altered.cooled(problem, np.float32(1.0))
    np.testing.assert_allclose(cool.target, problem.target, atol=1e-5)
    assert np.isfinite(altered._noise_of_target(problem)).all()


def test_the_norm_needed_is_where_the_error_crosses_the_tolerance():
    layer, whole = recording(adapted=("query", "value"), scale=0.01)
    problem = heads.make_head(layer, whole, 0).problem
    factor = methods.scale_needed([problem], ll.Polynomial(1), 0.1)
    assert 1 / 16 < factor < 1
    for scale, within in ((factor, True), (1.1 * factor, False)):
        cool = altered.cooled(problem, np.float32(scale))
        assert (
            errors.error(errors.arrays(cool, ll.Polynomial(1))[0], errors.exact_arrays(cool)) <= 0.1
        ) == within


@pytest.mark.parametrize(("linear", "crossing"), [(1e-6, 512), (1e-5, 1000), (1e-3, 100_000)])
def test_break_even_is_where_the_two_times_cross(monkeypatch, linear, crossing):
    def pair(self, problem, method, length=None):
        tokens = length or 512
        return linear * tokens, 1e-8 * tokens**2

    monkeypatch.setattr(times.Clock, "pair", pair)
    problem = SimpleNamespace(x_query=np.zeros((512, 1)))
    assert times.Clock().pays_from(problem, ll.Polynomial(1)) == pytest.approx(crossing, rel=0.02)


def test_a_method_as_slow_as_the_exact_one_pays_later_if_at_all(monkeypatch):
    monkeypatch.setattr(
        times.Clock, "pair", lambda self, problem, method, length=None: (1.001, 1.0)
    )
    problem = SimpleNamespace(x_query=np.zeros((512, 1)))
    assert times.Clock().pays_from(problem, ll.Polynomial(1)) > 512


def test_tokens_repeat_where_longer_texts_are_timed():
    problem = heads.make_head(*recording(), 0).problem
    longer = times.stretched(problem, 60)
    np.testing.assert_array_equal(longer.x_key[LENGTH : 2 * LENGTH], problem.x_key)
    assert {x.shape[0] for x in (longer.x_query, longer.x_key, longer.x_value, longer.target)} == {
        60
    }
