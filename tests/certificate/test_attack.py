"""The certificate under attack: inputs on which it was once false, and a small part of
experiments/attacks.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import lora_limits as ll
from experiments.attacks import ATTACKS
from experiments.attacks.directed import build as problem_of
from experiments.attacks.families import with_target
from experiments.attacks.tally import ratios
from experiments.problems import conditioned as problems
from experiments.problems import extended
from tests.support.tools import quick_jit

build = functools.partial(problem_of, beta=0.5)
DTYPES = (np.float64, np.float32)
RUN = quick_jit(ll.gradient, static_argnums=1)


def worst(problem, method):
    """(the largest error / bound, whether all bounds are finite) of one problem."""
    result = jax.tree.map(lambda v: np.asarray(v)[None], RUN(problem, method))
    ratio, finite = ratios(result, extended.gradients(problems.stack([problem])))
    return ratio[0], finite[0]


@pytest.mark.parametrize(
    ("dtype", "down", "far"),
    [
        (np.float64, 1e-155, 1),
        (np.float64, 1e-200, 1),
        (np.float32, 1e-25, 1),
        (np.float32, 3e-40, 1e8),
    ],
)
def test_values_whose_squares_underflow(dtype, down, far):
    """In float32 the gradient is 0, or the values are numbers that a processor may take for 0."""
    rng = np.random.default_rng(0)
    x = {n: rng.normal(size=(16, 2)) for n in problems.FULL}
    target = far * rng.normal(size=(16, 2))
    size = {"query": 1.0, "key": 0.1, "value": down}
    w = {n: size[n] * rng.normal(size=(2, 2)) for n in problems.FULL}
    ab = {n: (size[n] * rng.normal(size=(1, 2)), rng.normal(size=(2, 1))) for n in problems.FULL}
    ratio, finite = worst(build(x, target, w, ab, dtype), ll.Polynomial(2))
    assert ratio <= 1
    assert finite


def test_a_normaliser_of_cancellation():
    """One key at score -16, of no other interest: its powers cancel in D_i, and leave their rounding."""
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        signs, near = np.tile([1, -1.0], 4), np.repeat(rng.uniform(-0.3, 0.3, 4), 2)
        other, value = (signs * np.repeat(rng.uniform(0.5, 1, 4), 2) for _ in range(2))
        x = {
            "query": np.full((4, 1), rng.uniform(0.97, 1)),
            "key": np.stack([np.append(-16, near) / 16, np.append(0, other)], 1),
            "value": np.append(0, value)[:, None],
        }
        w = {"query": [[1.0]], "key": [[16.0], [0.0]], "value": [[1e-6]]}
        ab = {"key": ([[1.0]], [[0.0], [1e-3]])}
        problem = build(x, -rng.uniform(0.5, 1, (4, 1)), w, ab, np.float64, beta=1.0)
        ratio, finite = worst(problem, ll.Polynomial(70, centred=False))
        assert finite
        ratios.append(ratio)
    assert max(ratios) <= 1


def sound(tallies):
    broken = {family: tally.broken for family, tally in tallies.items() if tally.broken}
    assert not broken
    return sum(tally.finite for tally in tallies.values()) / sum(
        tally.problems for tally in tallies.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_family_breaks_a_bound(dtype):
    assert sound(ATTACKS["families"](600, 7, dtype, batch=100)) > 0.8


@pytest.mark.slow
def test_no_climb_breaks_a_bound():
    assert sound(ATTACKS["hill climbing"](2, 7, generations=20)) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_long_sequence_breaks_a_bound(dtype):
    assert sound(ATTACKS["long sequences"](2, 7, dtype)) > 0


def test_nothing_is_promised_of_a_large_array_that_single_precision_loses():
    """Sums overflow in single precision alone: NaN in 4096 entries, and a bound in double precision.

    A maximum over so many passes NaN by.
    """
    rng = np.random.default_rng(0)
    shape = problems.Shape(lq=16, lk=16, inputs=(512, 4, 4), width=2, value_width=2, rank=8)
    p = problems.make(3, shape=shape, adapt=("query",), kind="gaussian", dtype=np.float32)
    p = dataclasses.replace(p, x_value=np.float32(1e10) * p.x_value)
    huge = 1e30 * rng.choice([-1, 1], size=p.target.shape)
    result = RUN(with_target(p, huge.astype(np.float32)), ll.Polynomial(2))
    assert np.asarray(result.gradient["query"].b).size == 4096
    for half in ("a", "b"):
        sound = np.isfinite(getattr(result.gradient["query"], half)).all()
        assert not sound
        assert getattr(result.bound["query"], half) == np.inf
