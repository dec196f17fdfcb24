"""Arrays by name, relative errors, and the plain softmax."""

import math

import numpy as np
import pytest

import lora_limits as ll
from lora_limits.instruments import comparing


def test_arrays_are_named_in_float64_or_as_they_are():
    adapter = ll.Adapter(np.ones((1, 2), np.float32), np.zeros((3, 1), np.float32))
    got = comparing.named({"query": adapter, "value": adapter})
    assert list(got) == ["query.a", "query.b", "value.a", "value.b"]
    assert {x.dtype for x in got.values()} == {np.dtype(np.float64)}
    assert got["query.b"].shape == (3, 1)
    own = comparing.named({"query": adapter}, dtype=None)
    assert {x.dtype for x in own.values()} == {np.dtype(np.float32)}


def test_errors_are_relative_to_what_is_wanted():
    want = np.array([[3.0, 0.0], [0.0, 4.0]])
    got = want + np.array([[0.0, 1.0], [0.0, 0.0]])
    assert comparing.frobenius_error(got, want) == pytest.approx(1 / 5)
    assert comparing.max_error(got, want) == pytest.approx(1 / 4)


def test_of_zeros_only_zeros_are_right():
    zeros = np.zeros(3)
    assert comparing.frobenius_error(zeros, zeros) == 0
    assert comparing.frobenius_error(zeros + 1e-30, zeros) == math.inf
    assert math.isnan(comparing.frobenius_error(np.full(3, np.nan), np.ones(3)))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"shape: got \(3, 1\), expected \(3, 3\)"):
        comparing.max_error(np.ones((3, 1)), np.ones((3, 3)))


def test_the_rows_of_a_softmax_sum_to_one_however_large_the_scores():
    scores = np.array([[0.0, math.log(3.0)], [1000.0, -1000.0]])
    np.testing.assert_allclose(comparing.softmax(scores), [[0.25, 0.75], [1, 0]], atol=1e-15)
