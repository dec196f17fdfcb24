"""The peers: exact baselines agree with the library, approximations close in, and what is read off
a run is right.
"""

from functools import partial

import jax
import numpy as np
import pytest

import lora_limits as ll
from experiments import peers, scaling
from experiments.contenders import baselines, race, skinny, truth
from experiments.problems import conditioned as problems
from lora_limits.factors import nystrom, random_features
from lora_limits.problem import projections
from paper_figures import peers as figure
from tests.support.tools import assert_close, later, quick_jit

SHAPE = problems.Shape(lq=37, lk=37, inputs=(5, 5, 5), width=3, value_width=3, rank=2)


def gradient(problem, attention):
    return quick_jit(lambda p: baselines.gradient(p, attention))(problem)


# -------------------------------------------------------------------------------- exact baselines


@pytest.mark.parametrize(
    ("block", "adapt"),
    [(16, problems.FULL), (64, ("query",)), *later((1, problems.FULL), (37, problems.FULL))],
)
def test_the_row_blocked_gradient_is_exact(block, adapt):
    problem = problems.make(3, shape=SHAPE, adapt=adapt)
    want = ll.gradient(problem, ll.Exact())
    assert_close(gradient(problem, baselines.row_blocked(block)), want.gradient, 1e-12)
    assert baselines.loss(problem, baselines.row_blocked(block)) == pytest.approx(
        float(want.loss), rel=1e-12
    )


def test_the_dense_gradient_of_xla_is_exact_to_its_float32_softmax():
    problem = problems.make(3, shape=SHAPE)
    with jax.numpy_dtype_promotion("standard"):  # which it needs for float64
        got = gradient(problem, baselines.xla)
    assert_close(got, ll.gradient(problem, ll.Exact()).gradient, 1e-6)


@pytest.mark.slow
def test_the_gradient_of_tokamax_is_exact_to_single_precision():
    pytest.importorskip(
        "tokamax", reason="the package tokamax, an exact baseline where it installs"
    )
    problem = problems.make(3, shape=SHAPE)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = gradient(problem, baselines.tokamax_chunked)
    assert_close(got, ll.gradient(problem, ll.Exact()).gradient, 1e-5)


@pytest.mark.parametrize(
    "name", [n for n in race.exact_contenders(37, tuned=True) if n not in ("dense", "tokamax")]
)
def test_every_exact_contender_has_the_gradient_and_the_loss(name):
    problem, contender = problems.make(5, shape=SHAPE), race.exact_contenders(37, tuned=True)[name]
    want = ll.gradient(problem, ll.Exact())
    assert_close(quick_jit(contender.parts["gradient"])(problem), want.gradient, 1e-12)
    assert float(quick_jit(contender.parts["loss"])(problem)) == pytest.approx(
        float(want.loss), rel=1e-12
    )


# --------------------------------------------------------------------------------- approximations


def output_error(problem, attention):
    want = baselines.output(problem, baselines.row_blocked(64))
    return float(np.linalg.norm(baselines.output(problem, attention) - want) / np.linalg.norm(want))


def worst(problem, attention):
    true = truth.reference(problem)
    return truth.errors(gradient(problem, attention), true)["error"]


@pytest.mark.slow
def test_favor_converges_as_features_are_added():
    """Error falls like the inverse root of their number: 64 times as many, an eighth, within a
    factor of 2.
    """
    problem = problems.make(1, shape=SHAPE)

    def mean(features):
        keys = jax.random.split(jax.random.key(0), 3)
        drawn = [
            baselines.favor(random_features.orthogonal_frequencies(k, features, 3)) for k in keys
        ]
        return np.mean([(output_error(problem, a), worst(problem, a)) for a in drawn], axis=0)

    few, many = mean(64), mean(64 * 64)
    assert (many < few / 4).all()
    assert many[0] < 0.05


@pytest.mark.slow
def test_nystrom_converges_as_landmarks_are_added_to_what_its_cut_leaves():
    problem = problems.make(1, shape=SHAPE, kind="self attention")
    attentions = [baselines.nystrom(m) for m in (4, 12, 37)]
    few, some, all_tokens = ((output_error(problem, a), worst(problem, a)) for a in attentions)
    assert few[0] > some[0] > all_tokens[0]
    assert few[1] > some[1] > all_tokens[1]
    assert max(all_tokens) < 100 * baselines.CUT


def test_segments_cover_every_row_once():
    x = np.arange(22.0).reshape(11, 2)
    assert nystrom.segment_means(x, 11) == pytest.approx(x)
    assert nystrom.segment_means(x, 1) == pytest.approx(x.mean(0, keepdims=True))
    parts = np.array_split(x, 4)
    assert nystrom.segment_means(x, 4) == pytest.approx(np.stack([p.mean(0) for p in parts]))


def test_frequencies_are_orthogonal_in_blocks_and_gaussian_in_length():
    w = np.asarray(random_features.orthogonal_frequencies(jax.random.key(0), 4001, 4))
    assert w.shape == (4001, 4)
    gram = w[:4] @ w[:4].T
    assert gram == pytest.approx(np.diag(np.diag(gram)), abs=1e-12)
    assert (w**2).sum(1).mean() == pytest.approx(4, rel=0.05)
    assert np.abs(w.mean(0)).max() < 0.1


# ----------------------------------------------------------------------------------- measurements


def test_the_factor_behind_the_forward_error_is_that_of_the_polynomial_gradient():
    """Loss from the output of `polynomial` as from the method itself."""
    problem = problems.make(2, shape=SHAPE)
    contender = race.polynomial(3, SHAPE.width)
    out = quick_jit(contender.output)(problem)
    loss = 0.5 * float(((np.asarray(out) - np.asarray(problem.target)) ** 2).sum())
    assert float(quick_jit(contender.parts["loss"])(problem)) == pytest.approx(loss, rel=1e-12)


def test_a_bound_stands_beside_a_certified_gradient_with_a_truth_and_without():
    problem = ll.random_problem(jax.random.key(0), length=48, width=3, rank=2, gamma=0.5)
    contender = race.polynomial(2, 3)
    contender = contender._replace(parts={n: contender.parts[n] for n in ("gradient", "certified")})
    limits = race.Limits(repeats=1, max_seconds=1.0, max_bytes=1e9, most_features=8)
    true = truth.of_gradient(quick_jit(lambda p: ll.gradient(p, ll.Exact()).gradient)(problem))
    bounds = []
    for known in ([], [true._replace(rows=np.arange(1), output=np.ones((1, 3)))]):
        run, _ = race.race([problem], {"ours": contender}, limits, true=known, beside={})
        bounds.append(run["ours"]["bound"])
    # beside its own largest entry, or the true one
    assert bounds[0] == pytest.approx(bounds[1], rel=0.05)
    assert bounds[1] > run["ours"]["max_error"]


def test_errors_and_bounds_are_the_worst_of_all_problems_and_each_is_there():
    draw = partial(ll.random_problem, length=48, width=3, rank=2)
    # the worst is the second, so that neither the first nor the last passes for it
    tries = [draw(jax.random.key(n), gamma=g) for n, g in enumerate((0.5, 1.5, 0.3))]
    true = [truth.reference(p) for p in tries]
    limits = race.Limits(repeats=1, max_seconds=1.0, max_bytes=1e9, most_features=8)
    run, _ = race.race(tries, {"ours": race.polynomial(2, 3)}, limits, true=true, beside={})
    method = ll.Polynomial(2)
    each = [ll.gradient(p, method) for p in tries]
    want = {
        "error": [truth.errors(r.gradient, t)["error"] for r, t in zip(each, true, strict=True)],
        "bound": [truth.relative_bound(r.bound, t) for r, t in zip(each, true, strict=True)],
    }
    for name, values in want.items():
        assert run["ours"]["by_seed"][name] == pytest.approx(values, rel=1e-6)
        assert run["ours"][name] == pytest.approx(values[1], rel=1e-6)


def test_scaling_has_an_error_and_a_bound_of_every_seed(monkeypatch):
    monkeypatch.setattr(scaling, "_exchanged", lambda problem, config: {})
    sizes = {"width": 2, "rank": 1, "degree": 1, "repeats": 1, "max_seconds": 0.1}
    config = scaling.Config(exact_lengths=(32,), lengths=(32,), seeds=3, **sizes)
    (point, *_) = scaling.points(config)
    got = scaling.measure(point, config)
    for name in ("error", "bound"):
        assert len(set(got["by_seed"][name])) == 3
        assert got[name] == max(got["by_seed"][name])


def test_rates_are_held_against_the_products_round_by_round():
    def timed(*rounds):
        return {"seconds": float(np.median(rounds)), "rounds": list(rounds)}

    ours = {"family": "polynomial", "features": 6, "gradient": timed(2.0, 4.0, 4.0)}
    beside = {"square": timed(1.0, 2.0, 2.0), "skinny 6": timed(0.5, 1.0, 1.0)}
    methods = {"polynomial 2": ours, "dense": {"family": "exact", "features": None}}
    got = skinny.rates(methods, beside, 2 * skinny.SKINNY_LENGTH, 3)
    # half of the tokens in the product, a quarter of the gradient's time, three products
    assert got["attained"] == {"polynomial 2": 3 * 2 * 0.25}
    assert got["to_square"] == {"polynomial 2": 2}
    assert got["skinny_rate"] == {"polynomial 2": 2.0 * 6 * 4 * skinny.SKINNY_LENGTH / 1.0}


def test_multilayers_queries_keys_and_values_are_those_it_draws():
    problem = baselines.multilayer_problem(jax.random.key(0), length=4000, width=4, rank=4)
    q, k, v = projections(problem)
    assert np.asarray(q) == pytest.approx(np.asarray(problem.x_query), abs=1e-12)
    assert [float(x.std()) for x in (q, k, v)] == pytest.approx([0.5, 0.5, 1.0], rel=0.02)


def test_the_best_exact_is_named_and_speed_ups_are_over_it():
    def entry(family, **seconds):
        return {
            "family": family,
            "features": None,
            **{part: {"seconds": t, "rounds": [t, 3 * t]} for part, t in seconds.items()},
        }

    methods = {
        "rows 128": entry("exact", gradient=3.0, loss=1.0),
        "tiled 512": entry("exact", gradient=2.0, loss=4.0),
        "polynomial 2": entry("polynomial", gradient=0.5, loss=0.1, certified=1.0),
        "chain 2": {"family": "chain", "features": 6, "gradient": {"compile": 1.0}},
    }
    got = peers._best(methods)
    assert got["best"] == {"gradient": "tiled 512", "loss": "rows 128"}
    assert got["speed_up"]["gradient"] == {"polynomial 2": 4.0}
    assert got["speed_up"]["certified"] == {"polynomial 2": 2.0}
    assert got["speed_up"]["loss"] == pytest.approx({"polynomial 2": 10.0})


def test_equal_time_takes_the_most_features_that_are_no_slower():
    runs = [{"features": k, "seconds": t} for k, t in ((8, 1.0), (16, 2.0), (32, 5.0))]
    got = peers._equal_time({"polynomial 2": 0.5, "polynomial 3": 2.0}, {"favor": runs})
    assert got == {"polynomial 2": {"favor": None}, "polynomial 3": {"favor": runs[1]}}


# -------------------------------------------------------------------------------- figure and table


def test_crossovers():
    lengths = [256, 1024, 4096]
    slow, fast = [n**2 / 1000 for n in lengths], [float(n) for n in lengths]
    assert figure.crossover(lengths, slow, fast) == pytest.approx(1000)
    assert figure.crossover(lengths, fast, [2 * t for t in fast]) is None
    assert figure.crossover(lengths, [2 * t for t in fast], fast) is None
    row = {"point": {"length": 4000}, "metrics": {"model": {"polynomial 2": 3.0, "exact": 12.0}}}
    assert figure.analytic_crossover(row, "polynomial 2") == 1000


def test_the_table_has_a_line_for_every_method_and_says_where_it_loses():
    def method(family, seconds, error):
        cost = {"seconds": seconds, "temporary": 2e6, "compile": 0.5}
        return {
            "family": family,
            "features": 15,
            "gradient": cost,
            "error": error,
            "max_error": 0.2,
        }

    def row(point, methods, **metrics):
        speed_up = {
            "gradient": {
                n: 0.004 / m["gradient"]["seconds"] for n, m in methods.items() if n != "dense"
            }
        }
        best = {"gradient": "dense"}
        return {
            "point": point,
            "metrics": {"methods": methods, "speed_up": speed_up, "best": best, **metrics},
        }

    exact = {"family": "exact", "gradient": {"seconds": 0.004}}
    rows = [
        row(
            {"panel": "grid", "width": 4, "length": 160},
            {"dense": exact, "polynomial 2": method("polynomial", 0.001, 0.1)},
            attained={"polynomial 2": 0.5},
        ),
        row(
            {"panel": "length", "length": 256},
            {
                "dense": exact,
                "chain 15": method("chain", 0.0009, 0.95),
                "favor 15": method("favor", 0.008, 0.9),
                "nystrom 15": method("nystrom", 0.001, 1.5),
            },
        ),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in figure.table(rows).splitlines()
        if line
    ]
    assert lines[2][:6] == ["4", "160", "dense: 4", "2 (15)", "1", "4"]
    assert lines[2][-3:] == ["", "50%", "1.01 / 0.71 = 1.42"]
    assert [line[1:5] + line[-1:] for line in lines[6:8]] == [
        ["FAVOR+", "15", "8", "0.5", "exact"],
        ["Nyström", "15", "1", "4", "zero, chain 15"],
    ]
    assert len({len(line) for line in lines[:3]}) == len({len(line) for line in lines[3:8]}) == 1
