"""Numbers of the training experiments: seeds told apart from kinds of run, margins, regressions."""

import math

import numpy as np
import pytest

from experiments import batch_and_rank, crossing
from experiments.runner.note import load
from paper_figures import crossing as crossings
from paper_figures import finetune, sensitivity
from paper_figures.numbers import batch_and_rank as rule
from paper_figures.numbers import outlier_free
from tests.support import ROOT


def layer(gamma, score, **more):
    crossed = {"gamma": gamma, "score": score}
    return {"crossed": crossed, "score": [0.5, 1.5], "gamma": [1.0, 2.0], **more}


def crossed_row(seed, *layers, accuracy=0.5):
    point = {"rate": 1e-3, "rank": 4, "alpha": 8.0, "case": "plain", "seed": seed}
    metrics = {"steps": [0, 20], "layers": list(layers), "after": {"accuracy": accuracy}}
    return {"point": point, "metrics": metrics}


def test_a_crossing_is_told_over_its_seeds():
    more = {"bound 4": [1.0, 3.0], "error 4": [0.1, 0.2], "normaliser 4": [1.0, 1.0]}
    rows = [
        crossed_row(0, layer(0, 20, **more), layer(20, None, **more), accuracy=0.4),
        crossed_row(1, layer(20, None, **more), layer(20, None, **more), accuracy=0.6),
    ]
    ((point, seeds),) = crossings.runs(rows)
    assert "seed" not in point
    assert crossings.crossed(seeds, "score") == "step 20 (1 of 2 seeds)"
    assert crossings.crossed(seeds, "gamma") == "step 0 to 20"
    assert crossings.crossed(seeds, "score", 1) == "never"
    first, second = crossings.table(rows).splitlines()[2:4]
    # Where R crosses in the one seed and Gamma in the other, both at step 20.
    assert "| 3 | 0.2 | 1 | 0.500 ± 1.271 |" in first
    assert "| never |" in second


def test_runs_of_crossing_are_all_different_and_have_every_seed():
    sweep = load(ROOT / "configs" / "crossing.toml", "full")
    points = crossing.points(sweep.config)
    runs = {tuple(x for n, x in p.items() if n != "seed") for p in points}
    assert len(points) == 5 * len(runs) == len({tuple(p.values()) for p in points})
    starts = {p["rate"] for p in points if p["case"] == "as pretrained"}
    assert starts == {1e-3, 1e-2}
    # Of a single rate, the middle one is the largest.
    one = sweep.config.model_copy(update={"rates": (1e-2,), "cases": ("as pretrained",)})
    runs = [tuple(p.values()) for p in crossing.points(one)]
    assert len(runs) == len(set(runs))


def test_norms_are_crossed_with_rates_and_batches():
    """No kind of norms has a batch, a rate or a degree to itself."""
    config = load(ROOT / "configs" / "batch_and_rank.toml", "full").config
    runs = [p for p in batch_and_rank.points(config) if p["kind"] == "run" and p["rank"] == 4]
    seen = {}
    for p in runs:
        seen.setdefault(p["norms"], set()).add((p["batch"], p["rate"], p["method"], p["seed"]))
    assert seen["normalised"] == seen["shrunk"] == seen["free"]
    assert len(seen["free"]) == 2 * 2 * 6 * 5


def ruled_rows(losses, *, norms="free", seeds=2):
    """Exact and approximate runs whose error over noise is 2^n; losses: over exact's, by n."""
    rows = []
    for n, loss in enumerate(losses):
        # b bias / spread is the squared ratio.
        moments = {
            "exact": {"mean": 1.0, "spread": 1.0},
            "polynomial 2": {"mean": 4.0**n / 16, "spread": 0.0},
        }
        for seed in range(seeds):
            where = {"norms": norms, "rank": n, "batch": 16, "rate": 0.1}
            metrics = {"before": {"moments": moments}, "after": {"moments": moments}}
            rows.append({"point": {"kind": "noise", **where, "seed": seed}, "metrics": metrics})
            for method, value in (("exact", 1.0), ("polynomial 2", 1.0 + loss)):
                scores = {"loss": value, "accuracy": 0.5}
                metrics = {"own": scores, "exact": scores, "finite": math.isfinite(value)}
                point = {"kind": "run", **where, "method": method, "seed": seed}
                rows.append({"point": point, "metrics": metrics})
    return rows


def test_the_regression_is_within_one_kind_of_norms():
    rows = ruled_rows([0.0, 0.3, 0.6, 0.9]) + ruled_rows([5.0], norms="shrunk")
    slope, half, intercept = rule.regression(rows, "free")
    assert slope == pytest.approx(0.3 / math.log10(2))
    assert intercept == pytest.approx(0, abs=1e-9)
    assert half == pytest.approx(0, abs=1e-6)
    assert rule.regression(rows, "shrunk") is None
    assert rule.regression(rows, "normalised") is None
    # Runs that end in no number are counted apart, not averaged.
    rows = ruled_rows([0.0, 0.3, 0.6, math.nan])
    assert rule.regression(rows, "free")[0] == pytest.approx(0.3 / math.log10(2))
    assert "3 kinds of run, 1 more not finite" in rule.table(rows)


def test_the_rule_is_told_by_norms():
    rows = ruled_rows([0.1, 0.3]) + ruled_rows([0.5], norms="shrunk")
    assert rule.rule(rows, "loss", 0, below=False, norms="free")[0] == pytest.approx(0.2)
    assert rule.rule(rows, "loss", 0, below=False)[2] == 3
    assert rule.rule(rows, "loss", 0, below=True, norms="free") is None


def test_a_followed_run_is_held_against_the_exact_one_of_its_seed():
    rows = []
    for seed in range(2):
        for method, losses in (("exact", [1.0, 0.5]), ("polynomial 1", [1.0, 0.5 + 0.1 * seed])):
            point = {"kind": "followed", "norms": "shrunk", "method": method, "seed": seed}
            gradient = {"noise": [4.0, 4.0], "bias": [-1.0, 1.0], "variance": [1.0, 3.0]}
            metrics = {"steps": [0, 9], "test_loss": losses, "exact_loss": losses, **gradient}
            rows.append({"point": point, "metrics": metrics})
    # A seed whose exact run is missing is no pair.
    rows.append(rows[-1] | {"point": rows[-1]["point"] | {"seed": 7}})
    found = rule.followed(rows)["shrunk", "polynomial 1"]
    np.testing.assert_allclose(found["loss"], [[0, 0], [0, 0.1]], atol=1e-12)
    np.testing.assert_allclose(found["ratio"], [[0.5, 1.0]] * 2)
    np.testing.assert_allclose(found["bias"], [[0.0, 0.5]] * 2)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.1, -0.1, 0.0], "within"),
        ([0.0], "not shown to be within"),
        ([-5.0], "not shown to be within"),
        ([3.0, -3.0, 0.0], "not shown to be within"),
        ([-5.0, -5.1, -4.9], "beyond"),
        ([5.0, 5.1, 4.9], "beyond"),
        ([math.nan, 0.0], "beyond"),
    ],
)
def test_equivalence_is_an_interval_within_the_margin(differences, said):
    assert finetune.verdict([{"fields": {"margin": 0.02}}], differences) == said


def test_points_lost_are_means_over_degrees_of_the_same_seeds():
    rows = []
    for method, k, accuracies in (
        ("exact", None, (0.9, 0.8)),
        ("polynomial 1", 5, (0.8, 0.7)),
        ("polynomial 2", 15, (0.9, 0.8)),
    ):
        for seed, accuracy in enumerate(accuracies):
            point = {"task": "digits", "method": method, "seed": seed}
            own = {"own": {"accuracy": accuracy}, "before": {"accuracy": 0.2}}
            metrics = {**own, "finite": True, "features": k}
            rows.append({"point": point, "metrics": metrics})
    mean, half = sensitivity.lost(rows, "digits")
    assert mean == pytest.approx(5.0)
    assert half == pytest.approx(0, abs=1e-9)
    assert sensitivity.gain(rows, "digits") == pytest.approx(65.0)


def test_heads_of_all_seeds_count_and_norms_keep_their_spread():
    rows = []
    for seed, gamma in enumerate(([1.0, 3.0], [5.0, 7.0])):
        point = {"part": "features", "model": "125M", "attention": "softmax", "seed": seed}
        norms = {name: gamma for name in outlier_free.NORMS}
        errors = {"4": {"svd 32": [0.1 + seed, 0.3 + seed]}}
        rows.append({"point": point, "metrics": {**norms, "errors": errors}})
    (found,) = outlier_free.features(rows)
    assert found["norms"]["gamma"] == [2.0, 6.0]
    assert found["errors"]["4"]["svd 32"] == [0.1, 0.3, 1.1, 1.3]
    assert outlier_free.errors_by_width(rows, "svd", "softmax") == {32: [0.1, 0.3, 1.1, 1.3]}
