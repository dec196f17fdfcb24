"""Intervals of differences, and the verdict: every reason against is reached, and none is lost."""

import numpy as np
import pytest
from scipy import stats

from lora_limits.pilot import outcome
from lora_limits.pilot.settings import Settings

SETTINGS = Settings(32, seeds=3, steps=10)


def test_an_interval_of_one_seed_is_students():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 12))
    low, high = stats.ttest_1samp(x[0], 0).confidence_interval(outcome.LEVEL)
    found = outcome.interval(x)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Effects of seeds and of windows, of any relative size, and some of both: at least LEVEL."""
    rng = np.random.default_rng(1)
    for seeds, windows in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.2, 1.0)):
        covered = 0
        for _ in range(400):
            drawn = seeds * rng.normal(size=(3, 1)) + windows * rng.normal(size=(1, 8))
            found = outcome.interval(drawn + 0.3 * rng.normal(size=(3, 8)))
            covered += found.low <= 0 <= found.high
        assert covered / 400 > outcome.LEVEL - 0.05


def state(worse=0.0, spread=1e-4, gain=0.5, fast=1.0, error=0.1):
    """A finished pilot of three seeds and four windows whose loss ends `worse`."""
    rng = np.random.default_rng(2)
    runs = []
    for seed in range(3):
        for side in ("exact", "approximate"):
            end = 1.0 + (worse if side == "approximate" else 0.0)
            final = {"loss": list(end + spread * rng.normal(size=4))}
            run = {"side": side, "seed": seed, "final": final}
            if side == "approximate":
                run |= {"steps": [0, 5, 10], "error": [0.1, error, 0.1], "noise": [0.5] * 3}
            runs.append(run)
    times = {
        "exact": {"seconds": 2.0, "spread": 0.2},
        "approximate": {"seconds": fast, "spread": 0.2},
    }
    start = {"loss": 1.0 + gain, "accuracy": 0.5}
    return {"runs": runs, "classes": None, "times": times, "start": start}


@pytest.mark.parametrize(
    ("changed", "seeds", "reason"),
    [
        ({"worse": 0.1}, 3, "worse by more than the margin"),
        ({"spread": 0.05}, 3, "not shown"),
        ({"gain": 0.005}, 3, "gains less than the margin"),
        ({"worse": np.nan}, 3, "no number"),
        ({"fast": 1.9}, 3, "not faster"),
        ({}, 1, "one seed"),
    ],
    ids=str,
)
def test_every_reason_against(changed, seeds, reason):
    found = outcome.judge(state(**changed), Settings(32, seeds=seeds))
    assert not found["go"]
    assert reason in found["reason"]


def test_go_and_when_the_estimate_said_stop():
    found = outcome.judge(state(), SETTINGS)
    assert found["go"]
    assert found["stop"] is None
    assert found["speedup"] == 2.0
    # Better by more than the margin is no worse.
    assert outcome.judge(state(worse=-0.1), SETTINGS)["go"]
    for error in (0.5, np.nan):
        assert outcome.judge(state(error=error), SETTINGS)["stop"] == 5


def test_accuracy_is_better_where_it_is_larger():
    told = state()
    told["classes"] = ("a", "b")
    for run in told["runs"]:
        lost = 0.2 if run["side"] == "approximate" else 0.0
        run["final"]["accuracy"] = [0.9 - lost, 0.9 - lost, 0.9 - lost, 0.91 - lost]
    found = outcome.judge(told, SETTINGS)
    assert found["worse"]["mean"] == pytest.approx(0.2)
    assert found["gain"] == pytest.approx(0.4025)
    assert "worse by more" in found["reason"]
