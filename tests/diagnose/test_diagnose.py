"""`lora-limits diagnose` without its extra: heads from recordings, and what is measured on them."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.diagnose import errors, heads, methods, outputs, positions, times
from lora_limits.diagnose.layers import NAMES, Layer, Mask, read_mask
from lora_limits.diagnose.projections import Projection, join
from lora_limits.instruments.comparing import softmax
from lora_limits.instruments.timing import temporary_bytes
from lora_limits.problem import projections
from lora_limits.problem_checks import refuse_structure
from tests.support.tools import later

LENGTH, D_MODEL, HEADS, GROUPS, WIDTH, RANK = 24, 10, 4, 2, 3, 2
FULL, CAUSAL = Mask(), Mask(None, 0)


def recording(*, factor=1.0, mask=FULL, turn=None, adapted=NAMES, scale=0.5, residual=False):
    """A layer as a survey would leave it, four heads on two key heads, and its projections."""
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
    if turn is not None:
        rows |= {n: np.stack([turn(head) for head in rows[n]]) for n in ("query", "key")}
    scores = 0.4 * rows["query"] @ np.repeat(rows["key"], HEADS // GROUPS, 0).transpose(0, 2, 1)
    seen = mask.visible(np.arange(LENGTH), LENGTH)
    f = softmax(np.where(seen[None], scores, -1e30))
    output = f @ np.repeat(rows["value"], HEADS // GROUPS, 0)
    told = random.standard_normal(output.shape) if residual else ()
    layer = Layer(
        HEADS,
        GROUPS,
        0.4,
        mask,
        dict.fromkeys(NAMES, x),
        **{n: dict(enumerate(rows[n])) for n in NAMES},
        residual=dict(enumerate(told)),
        output=output.transpose(1, 0, 2).reshape(LENGTH, -1),
    )
    return layer, whole


def rotated(rows):
    """Rotary positions of two of three coordinates, neighbours."""
    angle = np.arange(LENGTH) * 0.3
    u, v, rest = rows.T
    return np.stack(
        [np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v, rest], 1
    )


def normalised(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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


@pytest.mark.parametrize(
    ("mask", "turn"), [(FULL, None), (CAUSAL, None), (CAUSAL, rotated), (Mask(5, 0), rotated)]
)
def test_a_method_is_tried_where_it_knows_what_the_problem_has(mask, turn):
    problem = heads.make_head(*recording(mask=mask, turn=turn), 0).problem
    tried = methods.ladder(problem, 8192)
    assert ("BlockTree" in tried) == (mask == FULL)
    assert ("Polynomial" in tried) == (not mask.window)
    for method in (family[0] for family in tried.values()):
        refuse_structure(problem, "it", method.knows)


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
    monkeypatch.setattr(methods, "ladder", lambda problem, length: rungs)
    monkeypatch.setattr(methods, "structure_of", lambda problem: ())
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


def test_windows_laid_end_to_end_are_one_text_with_their_own_residuals():
    problems = [heads.make_head(*recording(), 0, seed=seed).problem for seed in (1, 2)]
    long = outputs.laid_end_to_end(problems)
    assert long.x_key.shape[0] == long.target.shape[0] == 2 * LENGTH
    assert long.x_query is long.x_key is long.x_value
    np.testing.assert_array_equal(long.x_value[LENGTH:], problems[1].x_value)
    # the same text twice: attention over both is attention over one, so output and residual stay
    # what they are
    both = np.concatenate([p.target for p in problems])
    np.testing.assert_allclose(long.target, both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [4096, *later(8192)])
def test_frozen_heads_are_finite_at_length(tokens):
    """XLA's CPU compiler makes NaN of adapters of zeros at these lengths: none are made."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(tokens, 384)), np.float32)
    w = np.asarray(rng.normal(size=(384, 4)) / 20, np.float32)
    half = Projection(w, None, np.asarray(rng.normal(size=(384, 2)) / 20, np.float32), w[:2], 1.0)
    rows = x @ w + x @ half.b @ half.a
    layer = Layer(1, 1, 0.5, Mask(), dict.fromkeys(NAMES, x), *({0: rows} for _ in NAMES))
    problem = heads.make_head(layer, dict.fromkeys(NAMES, half), 0).problem
    cool = outputs.cooled(problem, np.float32(1.0))
    np.testing.assert_allclose(cool.target, problem.target, atol=1e-5)
    assert np.isfinite(problem.target).all()


def test_what_is_measured_holds_no_score_matrix():
    """Beside one pass of the model: blocks of queries, at any length."""
    tokens = 4096
    rows = jax.ShapeDtypeStruct((tokens, WIDTH), np.float32)
    compiled = outputs.attend.lower(rows, rows, rows, 0.5, ahead=0).compile()
    assert temporary_bytes(compiled) < tokens * tokens * 4 / 2


def test_the_norm_needed_is_where_the_error_crosses_the_tolerance():
    layer, whole = recording(adapted=("query", "value"), scale=0.01)
    problem = heads.make_head(layer, whole, 0).problem
    factor = methods.scale_needed(problem, ll.Polynomial(1), 0.2)
    assert 1 / 16 < factor < 1
    for scale, within in ((factor, True), (1.2 * factor, False)):
        cool = outputs.cooled(problem, np.float32(scale))
        assert (
            errors.error(errors.arrays(cool, ll.Polynomial(1))[0], errors.exact_arrays(cool)) <= 0.2
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
