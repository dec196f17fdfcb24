"""choose: what it returns is certified, exact where nothing cheaper is, and near what an oracle
would pick.
"""

import dataclasses

import jax
import numpy as np
import pytest

import lora_limits as ll
from lora_limits.gradients import cost
from lora_limits.polynomial import monomials
from tests.support.compiled import UNCERTIFIED
from tests.support.tools import later, quick_jit

GRADIENT = quick_jit(ll.gradient, static_argnames="method")
MAKE = jax.jit(
    lambda key, gamma, length=1024: ll.random_problem(
        key, length=length, width=3, rank=2, gamma=gamma
    ),
    static_argnames="length",
)


def largest(problem):
    """The largest entry of the exact gradient."""
    return max(
        float(abs(x).max()) for x in jax.tree.leaves(GRADIENT(problem, method=ll.Exact()).gradient)
    )


@pytest.mark.parametrize(("gamma", "relative"), [(1.0, 1e-2), *later((0.5, 1e-1), (0.5, 1e-4))])
def test_the_method_is_certified_and_within_two_degrees_of_the_oracle(gamma, relative):
    problem = MAKE(jax.random.key(3), gamma)
    tolerance = relative * largest(problem)
    exact = jax.tree.leaves(GRADIENT(problem, method=ll.Exact()).gradient)
    method = ll.choose(problem, tolerance)
    assert isinstance(method, ll.Polynomial)
    result = GRADIENT(problem, method=method)
    assert all(float(b) <= tolerance for b in jax.tree.leaves(result.bound))

    def good(degree):
        got = jax.tree.leaves(UNCERTIFIED(problem, ll.Polynomial(degree)).gradient)
        return all(np.abs(a - b).max() <= tolerance for a, b in zip(got, exact, strict=True))

    # three degrees lower is not enough even without a certificate
    assert method.degree < 3 or not good(method.degree - 3)


def test_exact_where_nothing_cheaper_certifies_it():
    problem = MAKE(jax.random.key(3), 6.0)
    assert isinstance(ll.choose(problem, 1e-3 * largest(problem)), ll.Exact)


def test_short_sequences_stay_exact_since_features_would_outnumber_tokens():
    problem = ll.random_problem(jax.random.key(0), length=8, width=3, rank=1, gamma=0.1)
    assert isinstance(ll.choose(problem, 1e-9), ll.Exact)


def test_a_tolerance_below_the_rounding_of_the_exact_gradient_is_refused():
    problem = ll.random_problem(jax.random.key(0), length=8, width=3, rank=1, gamma=0.1)
    with pytest.raises(
        ValueError, match=r"tolerance: got 1.0e-18 for query.a.*by which Exact may be"
    ):
        ll.choose(problem, 1e-18)
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), problem)
    with pytest.raises(ValueError, match=r"float32 \(float64 rounds less\)"):
        ll.choose(narrow, 1e-10)


def of_decoder(gamma, **fields):
    """Causal and rotary, keys adapted too."""
    length = 4096
    p = jax.tree.map(np.asarray, MAKE(jax.random.key(3), gamma, length=length))
    fields |= {"rotations": ll.rotary_angles(length, 2), "causal": True}
    return dataclasses.replace(p, adapters=dict(p.adapters, key=p.adapters["query"]), **fields)


@pytest.mark.slow
def test_a_causal_rotary_problem_gets_a_polynomial_that_keeps_its_promise():
    problem = of_decoder(0.5)
    want = jax.tree.leaves(GRADIENT(problem, method=ll.Exact(1024)).gradient)
    method = ll.choose(problem, 2e-2, relative=True, key=jax.random.key(1))
    assert isinstance(method, ll.Polynomial)
    got = jax.tree.leaves(GRADIENT(problem, method=method).gradient)
    for x, y in zip(got, want, strict=True):
        assert np.abs(x - y).max() <= 2e-2 * np.abs(y).max()


@pytest.mark.slow
def test_a_causal_problem_stays_exact_where_no_polynomial_promises_enough():
    assert isinstance(ll.choose(of_decoder(6.0), 1e-2, relative=True), ll.Exact)
    assert isinstance(ll.choose(of_decoder(0.5, window=9), 1e-2, relative=True), ll.Exact)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 16384])
def test_single_precision_gets_a_polynomial_where_one_holds(length):
    """d = 8, Gamma = 0.35, 1 % of the largest entry of every array."""
    with jax.enable_x64(False):
        problem = ll.random_problem(jax.random.key(0), length=length, width=8, rank=4, gamma=0.35)
        method = ll.choose(problem, 1e-2, relative=True, key=jax.random.key(1))
        assert isinstance(method, ll.Polynomial)
        assert method.degree % 2 == 0
        got = jax.jit(lambda p: ll.gradient(p, method).gradient)(problem)
        want = jax.jit(lambda p: ll.gradient(p, ll.Exact(1024)).gradient)(problem)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(abs(x - y).max()) <= 1e-2 * float(abs(y).max())


def test_the_cost_model_is_quadratic_against_linear():
    costs = {}
    for length in (1024, 2048):
        problem = ll.random_problem(jax.random.key(0), length=length, width=3, rank=2, gamma=1.0)
        costs[length] = (
            cost.exact_operations(problem),
            cost.polynomial_operations(problem, 4),
        )
    assert costs[2048][0] == 4 * costs[1024][0]
    assert costs[2048][1] == 2 * costs[1024][1]
    degree = cost.affordable(problem)
    assert cost.polynomial_operations(problem, degree) < costs[2048][0]
    assert cost.polynomial_operations(problem, degree + 1) >= costs[2048][0]
    assert monomials.count(3, degree) > 1


@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf"), "small"])
def test_a_tolerance_must_be_a_positive_number(tolerance):
    with pytest.raises(ValueError, match=r"tolerance: got .*, expected a number above 0"):
        ll.choose(MAKE(jax.random.key(0), 1.0), tolerance)
