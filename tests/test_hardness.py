"""Theorem 4.1 as a program: identities of the gadgets, right answers, and answers that break above the tolerance."""

import math

import jax
import numpy as np
import pytest

import lora_limits as ll
from lora_limits import hardness
from lora_limits.hardness import dimacs, instances, quadrature, sat
from lora_limits.hardness.command import solve_command
from lora_limits.hardness.deciders import PATH_SLACK, READOUT_SLACK, scan_length
from lora_limits.hardness.gadgets import inverse_noise, pad_score, token_rows
from lora_limits.problem import Adapter

EXACT = hardness.gradient_oracle()
MAKERS = {"random": instances.random_neighbours, "clustered": instances.clustered_neighbours}
DECIDERS = ("readout", "path")


def sizes(n):
    """Width 6 log2 n, distance 2, gap width / 8: R / ln n is a constant."""
    width = 6 * round(math.log2(n))
    return width, 2, width // 8


def neighbours(rng, n, kind, answer):
    a, b = MAKERS[kind](rng, n, *sizes(n), answer)
    _, distance, gap = sizes(n)
    assert (instances.closest(a, b) <= distance) == answer
    assert answer or instances.closest(a, b) >= distance + gap
    return a, b, distance, gap


def odds(gadget, beta0, sigma):
    """o_i from the definition, with no pads and no softmax."""
    scores = beta0 * (gadget.queries @ gadget.keys.T - gadget.level) - sigma
    return np.exp(scores).sum(1)


def noisy(error):
    """The exact oracle with error(entries) added to every entry of every array."""

    def oracle(problem):
        return jax.tree.map(lambda x: np.asarray(x) + error(x.shape), EXACT(problem))

    return oracle


# ------------------------------------------------------------------------------------------------- identities


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
        change = hardness.path_integral(lambda lam, g=gadget, b=beta0: hardness.path_problem(g, b, lam), EXACT, 40)
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
    published = hardness.path_integral(problem_at, EXACT, math.ceil(math.log(n) ** 4), hardness.left_riemann)
    assert abs(published - truth) > 1 / 8
    needed = hardness.nodes_needed(n, spread, 1e-3)
    assert quadrature.error_bound(n, spread, needed) <= 1e-3 < quadrature.error_bound(n, spread, needed - 1)


def test_nothing_overflows_at_4096():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, (4096, 72)), rng.integers(0, 2, (4096, 72))
    for gadget in (hardness.hamming_gadget(a, b, 4, 9), hardness.orthogonal_gadget(a, b)):
        beta0 = inverse_noise(gadget, READOUT_SLACK)
        for sigma in (0.0, scan_length(gadget, beta0) - 1.0):
            queries, keys, _ = token_rows(gadget, beta0, sigma)
            scores = queries[:1] @ keys.T / gadget.width
            assert np.isfinite(scores).all()
            np.testing.assert_allclose(scores[0, -1], pad_score(gadget, beta0, sigma), rtol=1e-9, atol=1e-9)
    assert beta0 * hardness.hamming_gadget(a, b, 4, 9).reach / math.log(4096) > 1


# ---------------------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("n", [64, 128])
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
        n, kind, answer = (64, 128, 256, 512)[trial % 4], tuple(MAKERS)[trial // 4 % 2], bool(trial // 8 % 2)
        instance = neighbours(rng, n, kind, answer)
        assert bool(hardness.nearest_neighbours(*instance, EXACT)) is answer
        assert bool(hardness.nearest_neighbours(*instance, EXACT, decider="path", nodes=24)) is answer


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
        assert bool(hardness.orthogonal_vectors(*orthogonality(trial, 1024), EXACT)) == bool(trial % 2)


def test_every_pair_meeting_once_is_the_worst_no():
    """tau_i is as large as it can be in every row: beta0 = ln n + c would not do, 1.5 ln n + c does."""
    a = b = np.ones((512, 1), np.int64)
    decision = hardness.orthogonal_vectors(a, b, EXACT)
    assert not decision
    assert -decision.margin >= decision.tolerance
    gadget = hardness.orthogonal_gadget(a, b)
    assert hardness.decide_by_readout(gadget, EXACT, beta0=math.log(512) + READOUT_SLACK)


# ------------------------------------------------------------------------------------------------------ noise


def _noise_instances(decider):
    rng = np.random.default_rng(7)
    for kind in MAKERS:
        for answer in (True, False):
            instance = neighbours(rng, 16, kind, answer)
            tolerance = hardness.nearest_neighbours(*instance, EXACT, decider=decider).tolerance
            yield instance, answer, tolerance
    if decider == "readout":
        for answer in (True, False):
            yield instances.random_orthogonality(rng, 20, 8, answer), answer, None


@pytest.mark.parametrize("decider", DECIDERS)
def test_errors_up_to_the_tolerance_change_no_answer(decider):
    rng = np.random.default_rng(8)
    for instance, answer, _ in _noise_instances(decider):
        decide = hardness.nearest_neighbours if len(instance) == 4 else hardness.orthogonal_vectors
        tolerance = decide(*instance, EXACT, decider=decider).tolerance
        against = -1.0 if answer else 1.0
        for error in (
            lambda shape, e=0.999 * tolerance * against: np.full(shape, e),
            lambda shape, e=tolerance: rng.uniform(-e, e, shape),
            lambda shape, e=tolerance: e * rng.choice([-0.999, 0.999], shape),
        ):
            decision = decide(*instance, noisy(error), decider=decider)
            assert bool(decision) is answer


@pytest.mark.parametrize("decider", DECIDERS)
def test_signed_errors_above_the_tolerance_flip_answers(decider):
    flips = {True: 0, False: 0}
    for instance, answer, tolerance in _noise_instances(decider):
        if tolerance is not None:
            error = 2.5 * tolerance * (-1.0 if answer else 1.0)
            decision = hardness.nearest_neighbours(
                *instance, noisy(lambda shape, e=error: np.full(shape, e)), decider=decider
            )
            flips[answer] += bool(decision) is not answer
    assert min(flips.values()) >= 1


def test_the_margin_is_the_error_that_flips_the_answer():
    instance = neighbours(np.random.default_rng(9), 32, "random", True)
    for decider in DECIDERS:
        margin = hardness.nearest_neighbours(*instance, EXACT, decider=decider).margin
        for factor, answer in ((0.99, True), (1.01, False)):
            oracle = noisy(lambda shape, e=factor * margin: np.full(shape, -e))
            assert bool(hardness.nearest_neighbours(*instance, oracle, decider=decider)) is answer


@pytest.mark.parametrize("decider", DECIDERS)
def test_an_oracle_that_answers_nan_decides_nothing(decider):
    def nothing(problem):
        return {name: Adapter(x.a * np.nan, x.b * np.nan) for name, x in problem.adapters.items()}

    assert not hardness.nearest_neighbours([[0, 1]], [[0, 1]], 0, 1, nothing, decider=decider)


def test_a_quadratic_does_not_crash_but_is_wrong():
    """The scores reach R = Theta(log n), far beyond what degree 2 can follow."""
    quadratic = hardness.gradient_oracle(ll.Polynomial(2))
    wrong = 0
    for answer in (True, False):
        a, b = instances.clustered_neighbours(np.random.default_rng(10), 32, 8, 1, 1, answer)
        wrong += bool(hardness.nearest_neighbours(a, b, 1, 1, quadratic)) is not answer
    assert wrong >= 1


# ------------------------------------------------------------------------------------------------------- SAT


def truth(clauses):
    solvers = pytest.importorskip("pysat.solvers", reason="python-sat settles what is satisfiable")
    with solvers.Cadical153(bootstrap_with=clauses) as solver:
        return bool(solver.solve())


@pytest.mark.parametrize("trial", range(10))
def test_random_3sat_of_12_variables(trial):
    clauses = instances.random_3sat(np.random.default_rng(trial), 12, 4.26 + 0.6 * (trial % 2))
    model, cost = hardness.find_model(clauses, EXACT)
    assert bool(hardness.satisfiable(clauses, EXACT)) == truth(clauses) == cost.satisfiable == (model is not None)
    assert model is None or (hardness.satisfies(model, clauses) and len(model) <= 12)


@pytest.mark.slow
def test_random_3sat_100_formulas():
    for trial in range(100):
        clauses = instances.random_3sat(np.random.default_rng(1000 + trial), 12 + 2 * (trial % 5), 4.26)
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


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hardness.orthogonal_vectors([[0, 2]], [[0, 1]], EXACT), r"a\[0\]: got entry 2, expected 0 or 1"),
        (lambda: hardness.orthogonal_vectors([[0, 1]], [[0.5, 1]], EXACT), r"b\[0\]: got entry 0.5"),
        (lambda: hardness.orthogonal_vectors([[0, 1]], [[1]], EXACT), "width 1, expected 2"),
        (lambda: hardness.orthogonal_vectors(np.zeros((0, 2)), [[0, 1]], EXACT), "at least one vector"),
        (lambda: hardness.orthogonal_vectors([[math.nan]], [[1]], EXACT), "nan, expected 0 or 1"),
        (lambda: hardness.orthogonal_vectors([0, 1], [[0, 1]], EXACT), "shape"),
        (lambda: hardness.orthogonal_vectors([[1]], [[1]], EXACT, decider="guess"), "decider: got 'guess'"),
        (lambda: hardness.orthogonal_vectors([[1]], [[1]], EXACT, nodes=3), "expected decider='path'"),
        (lambda: hardness.orthogonal_vectors([[1]], [[1]], EXACT, nodes=0, decider="path"), "at least 1"),
        (lambda: hardness.nearest_neighbours([[1]], [[1]], 0, 0, EXACT), "gap: got 0, expected"),
        (lambda: hardness.nearest_neighbours([[1]], [[1]], 2, 1, EXACT), "distance: got 2, expected"),
        (lambda: hardness.satisfiable([[1, 0]], EXACT), "clause 0: got literal 0, expected a non-zero integer"),
        (lambda: hardness.satisfiable([[1.5]], EXACT), "non-zero integer"),
        (lambda: hardness.satisfiable([[x] for x in range(1, 41)], EXACT), "40 would take 2097152 tokens"),
        (lambda: instances.random_neighbours(np.random.default_rng(0), 64, 8, 2, 4, False), "width: got 8"),
        (lambda: instances.clustered_neighbours(np.random.default_rng(0), 64, 5, 2, 4, False), "width: got 5"),
        (lambda: instances.random_3sat(np.random.default_rng(0), 2), "variables: got 2"),
    ],
)
def test_refusals_say_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: got the end of the file, expected 'p cnf"),
        ("1 2 0\n", "line 1: got '1', expected 'p cnf VARIABLES CLAUSES' before"),
        ("c hi\np cnf 2\n", "line 2: got 'p cnf 2', expected 'p cnf"),
        ("p cnf 2 -1\n", "line 1: .* expected 'p cnf"),
        ("p cnf 1 1\np cnf 1 1\n1 0\n", "line 2: got a second 'p' line"),
        ("p cnf 2 1\n1 x 0\n", "line 2: got 'x', expected an integer"),
        ("p cnf 2 1\n\n1 3 0\n", "line 3: got literal 3, expected a variable from 1 to 2"),
        ("p cnf 2 1\n1 2\n", "line 2: got the end of the file, expected 0"),
        ("p cnf 2 2\n1 2 0\n", "line 2: got 1 clauses, expected 2"),
    ],
)
def test_dimacs_errors_name_the_line(text, message):
    with pytest.raises(ValueError, match=message):
        dimacs.parse(text)


def test_dimacs_reads_what_solvers_read():
    formula = dimacs.parse("c comment\np cnf 4 3\n1 -2\n 3 0 -1 0\n0\n%\n0\n")
    assert formula == dimacs.Formula(4, [[1, -2, 3], [-1], []])


def test_solve_prints_a_model_that_satisfies(tmp_path, capsys):
    path = tmp_path / "yes.cnf"
    path.write_text("p cnf 4 3\n1 2 0\n-1 2 0\n-2 -3 0\n")
    assert solve_command(str(path)) == 0
    out = capsys.readouterr().out
    assert "SATISFIABLE" in out
    assert "UNSATISFIABLE" not in out
    model = [int(x) for line in out.splitlines() if line.startswith("v ") for x in line[2:].split()]
    assert model[-1] == 0
    assert [abs(x) for x in model[:-1]] == [1, 2, 3, 4]
    assert hardness.satisfies(model, [[1, 2], [-1, 2], [-2, -3]])
    for word in ("gradients", "tokens", "R / ln L", "seconds"):
        assert word in out


def test_solve_says_unsatisfiable_and_reports_errors_in_one_line(tmp_path, capsys):
    path = tmp_path / "no.cnf"
    path.write_text("p cnf 1 2\n1 0\n-1 0\n")
    assert solve_command(str(path)) == 0
    assert "s UNSATISFIABLE" in capsys.readouterr().out
    for name, text in (("bad.cnf", "p cnf 1 1\n1 2 0\n"), ("missing.cnf", None), ("latin.cnf", b"\xff\xfe")):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        assert solve_command(str(tmp_path / name)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
