"""Timing by turns, compile time apart, working memory without a run."""

import math
import re
import time

import pytest

from lora_limits.instruments import timing


def test_contenders_are_timed_by_turns():
    calls = []
    times = timing.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, max_seconds=9
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert times["a"]["repeats"] == len(times["a"]["rounds"]) == 3
    assert sorted(times["a"]["rounds"])[1] == times["a"]["seconds"]
    assert times["a"]["seconds"] >= 0
    assert timing.median_time(time.sleep, 0.01, repeats=50, max_seconds=0.035)["repeats"] < 6
    with pytest.raises(ValueError, match="repeats: got 0"):
        timing.median_time(time.sleep, 0.01, repeats=0, max_seconds=1)


def test_what_runs_in_the_wake_of_a_slow_one_is_timed_again():
    """As where gigabytes are given back while the next program starts."""
    calls = []

    def slow():
        calls.append("s")
        time.sleep(0.2)

    def quick():
        calls.append("q")
        time.sleep(0.04 if "s" in calls[-3:] else 0.001)

    times = timing.interleaved({"slow": slow, "quick": quick}, repeats=3, max_seconds=9)
    assert re.fullmatch("sq" + "sqqq+" + "qs" + "sqqq+", "".join(calls))
    assert max(times["quick"]["rounds"]) < 0.03


def test_a_ratio_is_of_the_rounds_and_a_machine_that_slows_down_does_not_move_it():
    fast = {"rounds": [1.0, 1.0, 2.0, 2.0, 2.0]}
    slow = {"rounds": [10.0, 10.0, 20.0, 20.0, 24.0]}
    assert timing.ratio(slow, fast) == (10, 0)
    assert timing.ratio(slow, {"rounds": [1.0, 2.0, 4.0, 2.0, 2.0]}) == (10, 2.5)


def test_compile_time_and_working_memory_are_read_without_a_run():
    import jax
    import jax.numpy as jnp

    x = jnp.ones((256, 1))
    # a sort needs its whole input, so no compiler can do without the 256 x 256 numbers
    compiled, seconds = timing.compile_seconds(
        jax.jit(lambda x: jnp.linalg.norm(jnp.sort(x @ x.T, axis=0) @ x)), x
    )
    assert seconds > 0
    assert (timing.temporary_bytes(compiled) or 0) >= 256 * 256 * 4
    assert math.isfinite(float(compiled(x)))
