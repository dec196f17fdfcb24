"""Theorem 4.1 as a program: identities of the gadgets, and right answers."""

import math

import jax
import numpy as np
import pytest

from lora_limits import hardness
from lora_limits.hardness import instances, quadrature, sat
from lora_limits.hardness.deciders import PATH_SLACK, READOUT_SLACK, scan_length
from lora_limits.hardness.gadgets import inverse_noise, pad_score, token_rows
from tests.support.neighbours import DECIDERS, EXACT, MAKERS, neighbours, noisy, odds, sizes
from tests.support.tools import later

# -------------------------------------------------------------------------------------------------
# identities


def both_gadgets(rng):
    a, b, distance, gap = neighbours(rng, 32, "clustered", True)
    yield hardness.hamming_gadget(a, b, distance, gap)
    yield hardness.orthogonal_gadget(*instances.random_orthogonality(rng, 21, 14, True))


def test_one_entry_of_a_fresh_adapter_reads_tau_squared_one_minus_tau():
    for gadget in both_gadgets(np.random.default_rng(0)):
        beta0 = inverse_noise(gadget, READOUT_SLACK)
        for sigma in (0.0, 1.0, 3.0):
            with jax.enable_x64(True):
                entry = EXACT(hardness.readout_problem(gadget, beta0, sigma))["query"].b[-1, 0]
            tau = odds(gadget, beta0, sigma) / (1 + odds(gadget, beta0, sigma))
            np.testing.assert_allclose(float(entry), beta0 * (tau**2 * (1 - tau)).sum(), rtol=1e-9)


def test_the_path_integral_recovers_the_sum_of_tau_squared():
    for gadget in both_gadgets(np.random.default_rng(1)):
        beta0 = inverse_noise(gadget, PATH_SLACK)
        change = hardness.path_integral(
            lambda lam, g=gadget, b=beta0: hardness.path_problem(g, b, lam), EXACT, 40
        )
        na, nb, length = len(gadget.queries), len(gadget.keys), gadget.tokens
        tau = odds(gadget, beta0, 0.0) / (1 + odds(gadget, beta0, 0.0))
        squares = length * (nb / length) ** 2 + change - (length - na) * (nb / length) ** 2
        np.testing.assert_allclose(squares, (tau**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("slack", [PATH_SLACK, READOUT_SLACK])
@pytest.mark.parametrize("n", [32, 64])
def test_the_gap_between_yes_and_no_is_the_one_derived(n, slack):
    rng = np.random.default_rng(n)
    for kind in MAKERS:
        no = hardness.hamming_gadget(*neighbours(rng, n, kind, False))
        o = odds(no, inverse_noise(no, slack), 0.0)
        assert ((o / (1 + o)) ** 2).sum() <= math.exp(-2 * slack)
        yes = hardness.hamming_gadget(*neighbours(rng, n, kind, True))
        beta0 = inverse_noise(yes, slack)
        assert odds(yes, beta0, 0.0).max() >= 1
        readings = []
        for sigma in range(scan_length(yes, beta0)):
            o = odds(yes, beta0, sigma)
            readings.append((o**2 / (1 + o) ** 3).sum())
        assert max(readings) >= 1 / 8


def test_quadrature_error_stays_below_its_bound_and_left_riemann_misses_the_gap():
    n = 64
    a, b, distance, gap = neighbours(np.random.default_rng(2), n, "random", False)
    gadget = hardness.hamming_gadget(a, b, distance, gap)
    beta0 = inverse_noise(gadget, PATH_SLACK)

    def problem_at(lam):
        return hardness.path_problem(gadget, beta0, lam)

    o = odds(gadget, beta0, 0.0)
    truth = ((o / (1 + o)) ** 2).sum() - n * (n / gadget.tokens) ** 2
    spread = 2 * beta0 * gadget.reach
    for nodes in (8, 16, 60, 150):
        error = abs(hardness.path_integral(problem_at, EXACT, nodes) - truth)
        assert error <= quadrature.error_bound(n, spread, nodes) + 1e-9
    assert abs(hardness.path_integral(problem_at, EXACT, 24) - truth) < 1e-5
    published = hardness.path_integral(
        problem_at, EXACT, math.ceil(math.log(n) ** 4), hardness.left_riemann
    )
    assert abs(published - truth) > 1 / 8
    needed = hardness.nodes_needed(n, spread, 1e-3)
    assert (
        quadrature.error_bound(n, spread, needed)
        <= 1e-3
        < quadrature.error_bound(n, spread, needed - 1)
    )


def test_nothing_overflows_at_4096():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, (4096, 72)), rng.integers(0, 2, (4096, 72))
    for gadget in (hardness.hamming_gadget(a, b, 4, 9), hardness.orthogonal_gadget(a, b)):
        beta0 = inverse_noise(gadget, READOUT_SLACK)
        for sigma in (0.0, scan_length(gadget, beta0) - 1.0):
            queries, keys, _ = token_rows(gadget, beta0, sigma)
            scores = queries[:1] @ keys.T / gadget.width
            assert np.isfinite(scores).all()
            np.testing.assert_allclose(
                scores[0, -1], pad_score(gadget, beta0, sigma), rtol=1e-9, atol=1e-9
            )
    assert beta0 * hardness.hamming_gadget(a, b, 4, 9).reach / math.log(4096) > 1


# ----------------------------------------------------------------------------------------------
# right answers


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("n", [64, *later(128)])
def test_nearest_neighbours(n, kind, answer, decider):
    instance = neighbours(np.random.default_rng(n), n, kind, answer)
    decision = hardness.nearest_neighbours(*instance, EXACT, decider=decider)
    assert bool(decision) is answer
    assert (decision.margin > 0) is answer
    assert abs(decision.margin) >= decision.tolerance * (1 - 1e-6) > 0
    assert decision.tokens == 2 * n
    assert 4 < decision.score_ratio < 9
    np.testing.assert_allclose(decision.gamma**2, decision.score_bound)


@pytest.mark.parametrize("answer", [True, False])
def test_nearest_neighbours_of_512(answer):
    instance = neighbours(np.random.default_rng(4), 512, "random", answer)
    assert bool(hardness.nearest_neighbours(*instance, EXACT)) is answer
    assert bool(hardness.nearest_neighbours(*instance, EXACT, decider="path", nodes=20)) is answer


@pytest.mark.slow
def test_nearest_neighbours_200_instances():
    rng = np.random.default_rng(5)
    for trial in range(200):
        n, kind, answer = (
            (64, 128, 256, 512)[trial % 4],
            tuple(MAKERS)[trial // 4 % 2],
            bool(trial // 8 % 2),
        )
        instance = neighbours(rng, n, kind, answer)
        assert bool(hardness.nearest_neighbours(*instance, EXACT)) is answer
        assert (
            bool(hardness.nearest_neighbours(*instance, EXACT, decider="path", nodes=24)) is answer
        )


@pytest.mark.slow
@pytest.mark.parametrize("answer", [True, False])
def test_nearest_neighbours_of_4096_by_the_tiled_gradient(answer):
    n = 4096
    a, b = instances.random_neighbours(np.random.default_rng(6), n, *sizes(n), answer)
    decision = hardness.nearest_neighbours(a, b, *sizes(n)[1:], EXACT)
    assert bool(decision) is answer
    assert decision.tokens == 8192


@pytest.mark.slow
def test_nearest_neighbours_of_4096_by_the_path():
    n = 4096
    a, b = instances.random_neighbours(np.random.default_rng(6), n, *sizes(n), True)
    assert hardness.nearest_neighbours(a, b, *sizes(n)[1:], EXACT, decider="path", nodes=24)


def orthogonality(trial, largest):
    rng = np.random.default_rng(trial)
    n = int(rng.integers(2, largest + 1))
    width = (4, 9, 17, 32, 47)[trial // 2 % 5]
    a, b = instances.random_orthogonality(rng, n, width, bool(trial % 2), rng.uniform(0.2, 0.8))
    b = b[: max(1, n - int(rng.integers(4)))] if not trial % 2 else b
    assert instances.has_orthogonal_pair(a, b) == bool(trial % 2)
    return a, b


@pytest.mark.parametrize("trial", range(20))
def test_orthogonal_vectors(trial):
    a, b = orthogonality(trial, 64)
    for decider in DECIDERS if trial < 4 else ("readout",):
        assert bool(hardness.orthogonal_vectors(a, b, EXACT, decider=decider)) == bool(trial % 2)


@pytest.mark.slow
def test_orthogonal_vectors_200_instances():
    for trial in range(200):
        assert bool(hardness.orthogonal_vectors(*orthogonality(trial, 1024), EXACT)) == bool(
            trial % 2
        )


def test_every_pair_meeting_once_is_the_worst_no():
    """tau_i is as large as it can be in every row: beta0 = ln n + c would not do, 1.5 ln n + c
    does.
    """
    a = b = np.ones((512, 1), np.int64)
    decision = hardness.orthogonal_vectors(a, b, EXACT)
    assert not decision
    assert -decision.margin >= decision.tolerance
    gadget = hardness.orthogonal_gadget(a, b)
    assert hardness.decide_by_readout(gadget, EXACT, beta0=math.log(512) + READOUT_SLACK)


# ------------------------------------------------------------------------------------------------------- SAT


def truth(clauses):
    solvers = pytest.importorskip("pysat.solvers", reason="python-sat settles what is satisfiable")
    with solvers.Cadical153(bootstrap_with=clauses) as solver:
        return bool(solver.solve())


@pytest.mark.parametrize("trial", range(10))
def test_random_3sat_of_12_variables(trial):
    clauses = instances.random_3sat(np.random.default_rng(trial), 12, 4.26 + 0.6 * (trial % 2))
    model, cost = hardness.find_model(clauses, EXACT)
    assert (
        bool(hardness.satisfiable(clauses, EXACT))
        == truth(clauses)
        == cost.satisfiable
        == (model is not None)
    )
    assert model is None or (hardness.satisfies(model, clauses) and len(model) <= 12)


@pytest.mark.slow
def test_random_3sat_100_formulas():
    for trial in range(100):
        clauses = instances.random_3sat(
            np.random.default_rng(1000 + trial), 12 + 2 * (trial % 5), 4.26
        )
        assert bool(hardness.satisfiable(clauses, EXACT)) == truth(clauses)


def test_satisfiable_by_the_path():
    clauses = [[1, 2], [-1, 2], [1, -2]]
    assert hardness.satisfiable(clauses, EXACT, decider="path")
    assert not hardness.satisfiable([*clauses, [-1, -2]], EXACT, decider="path")


def test_formulas_that_need_no_oracle():
    def never(problem):
        raise AssertionError("the oracle was called")

    assert hardness.satisfiable([], never)
    assert hardness.satisfiable([], never).calls == 0
    assert not hardness.satisfiable([[1], []], never)
    assert hardness.find_model([], never)[0] == []
    assert hardness.find_model([[]], never)[0] is None


def test_one_variable_and_identical_assignments():
    assert hardness.find_model([[1]], EXACT)[0] == [1]
    assert hardness.find_model([[-3], [-3, 3]], EXACT)[0] == [-3]
    assert hardness.find_model([[1], [-1]], EXACT)[0] is None
    a, b = sat.split_and_list([[1, 2]] * 3 + [[3, 4]])
    assert len(a) == 2  # of the 4 assignments of variables 1 and 2, by which clauses they miss
    assert len(b) == 2


def test_a_deceitful_oracle_finds_no_model():
    always = noisy(lambda shape: np.full(shape, 1e3))
    model, cost = hardness.find_model([[1], [-1]], always)
    assert cost.satisfiable
    assert model is None
