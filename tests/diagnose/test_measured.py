"""`lora-limits diagnose` without its extra: what is measured on a head: errors, noise, times."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.diagnose import errors, heads, longer, methods, outputs, times
from lora_limits.diagnose.layers import NAMES, Layer, Mask
from lora_limits.diagnose.projections import Projection
from lora_limits.gradients import by_rows
from lora_limits.instruments.timing import temporary_bytes
from lora_limits.problem_checks import refuse_structure
from tests.diagnose.made_up import CAUSAL, FULL, LENGTH, WIDTH, recording, rotated
from tests.support.tools import later


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


@pytest.mark.parametrize(("length", "degrees"), [(24, {2, 4}), (508, {2, 4}), (512, {1, 2, 3, 4})])
def test_of_a_short_text_with_an_order_no_more_than_a_quarter_is_exact(length, degrees):
    """Blocks of up to 512 tokens are exact in themselves: a text of one would seem right as it is."""
    plain = heads.make_head(*recording(mask=CAUSAL, turn=rotated), 0).problem
    problem = times.stretched(plain, length)
    tried = methods.ladder(problem, length)["Polynomial"]
    assert {p.degree for p in tried} & {1, 2, 3, 4} == degrees
    assert max(by_rows.block_size(problem, p) for p in tried) <= -(-length // 4)
    assert {methods.label(p) for p in tried} == {f"Polynomial({p.degree})" for p in tried}
    # Where nothing has an order nothing is exact either, and all degrees are there.
    free = methods.ladder(heads.make_head(*recording(), 0).problem, length)["Polynomial"]
    assert {p.degree for p in free} >= {1, 2, 3, 4}


def test_longer_texts_are_timed_in_their_own_blocks(monkeypatch):
    problem = heads.make_head(*recording(mask=CAUSAL, turn=rotated), 0).problem
    tokens, asked = problem.x_query.shape[0], []
    monkeypatch.setattr(
        times, "run", lambda p, method: asked.append((p.x_query.shape[0], method.block_size))
    )
    method = methods.ladder(problem, tokens)["Polynomial"][0]
    assert method.block_size
    exact = ll.Exact().block_size
    monkeypatch.setattr(times, "exact_method", lambda problem: ll.Exact())
    for length in (None, 2 * tokens):
        times.Clock().pair(problem, method, length)
    here, longer_text = ({b for n, b in asked if n == m} for m in (tokens, 2 * tokens))
    assert (here, longer_text) == ({method.block_size, exact}, {None, exact})


def test_where_a_longer_text_fails_its_norms_are_what_is_too_large():
    plain = heads.make_head(*recording(mask=CAUSAL, turn=rotated), 0).problem
    hot = outputs.cooled(times.stretched(plain, 64), jax.numpy.asarray(3.0, plain.dtype))
    norms = {"gamma_centred": 2.0}
    row = {
        "method": "Polynomial(2)",
        "pays_from": 50,
        "error": 1e-6,
        "noise": None,
        "rank_of_adapter": 4,
        "update": {},
        "norms": {"frozen": norms, "adapted": norms},
        "dial": {"method": "Polynomial(2)", "pays_from": 50, "scale": 1.0},
    }
    longer._measure(row, hot, times.Clock(), 0.01)
    assert (row["verdict"], row["pays_from"]) == ("never", None)
    assert row["longer"]["error"] > 0.01
    assert row["dial"]["pays_from"] == 50
    assert row["dial"]["scale"] is None or row["dial"]["scale"] < 1
    assert row["dials"]["gamma_needed"] != 2.0


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
