"""Rotary positions: lengths kept, scores of distances alone, angles that far positions do not lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.rotary import rotary_angles, rotate, rotate_back


def test_a_rotation_keeps_lengths_and_is_undone():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 7))
    angles = rotary_angles(9, 4)
    y = rotate(x, angles)
    np.testing.assert_allclose((y**2).sum(1), (x**2).sum(1), rtol=1e-14)
    np.testing.assert_array_equal(y[:, 4:], x[:, 4:])
    np.testing.assert_allclose(rotate_back(y, angles), x, atol=1e-15)


def test_scores_depend_on_distances_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 6))
    at = rotary_angles(np.array([3, 10, 1003, 1010]), 6)
    x = rotate(np.repeat(q, 4, 0), at)
    y = rotate(np.repeat(k, 4, 0), at)
    np.testing.assert_allclose(x[0] @ y[1], x[2] @ y[3], rtol=1e-12)
    np.testing.assert_allclose(x[1] @ y[0], x[3] @ y[2], rtol=1e-12)


def test_a_rotation_takes_the_max_norm_to_the_root_of_two_at_most_and_gets_there():
    x = jnp.ones((1, 2))
    top = float(jnp.abs(rotate(x, np.full((1, 1), np.pi / 4))).max())
    np.testing.assert_allclose(top, 2**0.5, rtol=1e-15)


def test_far_positions_keep_their_digits_in_single_precision():
    wide, narrow = (rotary_angles(np.array([2**20 + 1]), 8, dtype=d) for d in ("f8", "f4"))
    np.testing.assert_allclose(narrow, wide, atol=3e-7)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(np.cos(wide[0, 0]), np.cos(2.0**20 + 1), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": 4, "width": 3}, "width: got 3, expected an even"),
        ({"positions": 0, "width": 2}, "positions: got 0"),
        ({"positions": np.zeros((2, 2)), "width": 2}, r"positions: got shape \(2, 2\)"),
        ({"positions": 4, "width": 2, "base": -1.0}, "base: got -1.0"),
    ],
)
def test_what_is_wrong_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ll.rotary_angles(**arguments)


def test_random_problems_may_be_causal_and_rotary():
    options = {"length": 8, "width": 5, "rank": 2, "gamma": 0.7}
    plain = ll.random_problem(jax.random.key(0), **options)
    p = ll.random_problem(jax.random.key(0), causal=True, rotary=True, **options)
    assert p.causal
    assert p.rotations.query.shape == (8, 2)
    np.testing.assert_array_equal(p.x_query, plain.x_query)
    assert not plain.causal
    assert plain.rotations is None
