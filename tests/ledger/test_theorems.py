"""The ledger: every statement of the paper is there, has a verdict, and its evidence supports
it.
"""

import ast
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.ledger import (
    approximation,
    command,
    conditions,
    corrections,
    exactness,
    limits,
    operations,
    row,
    tensors,
)
from lora_limits.polynomial import needed
from lora_limits.problem import projections
from tests.support import ROOT
from tests.support.tools import quick_jit

EXPECTED = """
Eq. 1.1|Def. 1.1|Def. 1.2|Problem 1|Theorem 1.1|Theorem 1.2|Lemma 1.1|Def. 2.1-2.4|Lemma 2.1|Eq. 2.1|(C1), (C2)
Def. 2.5, Rem. 2.1|Def. 3.1, (S1)-(S3)|(S4)|Eq. 3.3, Problem 2|Def. 3.2-3.5|Lemma 3.1|Rem. 3.1|Rem. 3.2|Lemma 3.2
Def. 3.6|Lemma 3.3|Lemma 3.4|Lemma 3.5|Lemma 3.6|Lemma 3.7|Theorem 3.1|Hypothesis 1|Theorem 4.1|Rem. 4.1|Rem. 4.2
Rem. 5.2|Rem. 5.3|Def. A.1, Eq. A.1, A.2|Rem. A.1|Problem 3|Theorem A.1|Lemma C.1|Def. D.1-D.8|Lemma D.1|Lemma D.2
Lemma D.3|Lemma D.4|Lemma D.5|Lemma D.6|Lemma D.7|Lemma D.8|Lemma D.9|Def. E.1|Lemma E.1|App. E|Rem. F.1|Theorem F.1
Table 1|App. G, Fig. 1
"""


@functools.cache
def functions(path):
    """Names of the functions of a test file, read and not run."""
    return {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("entry", command.LEDGER, ids=lambda entry: entry.number)
def test_every_row_has_a_verdict_and_evidence_for_it(entry):
    assert entry.verdict in command.VERDICTS
    evidence = command.examine(entry)
    assert isinstance(evidence.holds, bool | np.bool_)
    assert evidence.holds, evidence.measured
    assert any(letter.isdigit() for letter in evidence.measured)


def test_every_statement_of_the_paper_is_there_once():
    numbers = [entry.number for entry in command.LEDGER]
    assert len(numbers) == len(set(numbers))
    assert {part for line in EXPECTED.split("\n") for part in line.split("|") if part} <= set(
        numbers
    )


def test_every_row_names_a_test_and_a_figure_that_exist():
    for entry in command.LEDGER:
        path, _, name = entry.test.partition("::")
        assert name in functions(path), entry.number
        assert not entry.figure or (ROOT / "paper_figures" / f"{entry.figure}.py").is_file(), (
            entry.number
        )


def test_evidence_does_not_depend_on_the_precision_outside():
    entry = next(entry for entry in command.LEDGER if entry.number == "Lemma 3.2")
    with jax.enable_x64(False):
        assert command.examine(entry).holds


# ------------------------------------------------------ statements that no other file tests


def test_the_tensor_trick_needs_row_major_vectors():
    """Lemmas 2.1, 3.1, C.1 and D.1: Kronecker forms against matrices, on random sizes, and
    column-major fails.
    """
    rng = np.random.default_rng(0)
    for _ in range(20):
        (m, n), (k, o) = rng.integers(2, 6, (2, 2))
        a, x, b = rng.normal(size=(m, n)), rng.normal(size=(n, k)), rng.normal(size=(o, k))
        want = a @ x @ b.T
        np.testing.assert_allclose(
            np.kron(a, b) @ x.reshape(-1), want.reshape(-1), rtol=1e-10, atol=1e-12
        )
        assert (
            np.abs(np.kron(a, b) @ x.reshape(-1, order="F") - want.reshape(-1, order="F")).max()
            > 1e-3
        )
    for seed, shape in ((1, problems.SELF), (2, problems.CROSS)):
        p = problems.make(seed, shape=shape, reach=2.0)
        t = row.terms(p)
        kernel = tensors.kronecker_gradient(p.x_query, p.beta * t["K"], t)
        np.testing.assert_allclose(kernel, exactness.weight_gradients(p)[0], rtol=1e-9, atol=1e-12)
        key = tensors.kronecker_gradient(t["Q"], p.beta * p.x_key, t)
        np.testing.assert_allclose(key.T, exactness.weight_gradients(p)[1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(tensors.kronecker_terms(p)[1], t["f"], rtol=1e-10)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (5, 3), (4, 4)])
def test_the_transposition_is_a_permutation(rows, columns):
    t = tensors.transposition(rows, columns)
    w = np.random.default_rng(rows).normal(size=(rows, columns))
    np.testing.assert_array_equal(t @ w.reshape(-1), w.T.reshape(-1))
    np.testing.assert_array_equal(t @ t.T, np.eye(rows * columns))
    np.testing.assert_array_equal(tensors.transposition(columns, rows), t.T)


def test_operations_grow_as_counted():
    """Theorem F.1, Remarks 3.1 and F.1: cubic, quadratic and linear; the reduced forms stay cheaper
    from L = 128 on.
    """
    counts = [
        f(128)
        for f in (
            operations.naive_operations,
            operations.dense_operations,
            operations.chain_operations,
        )
    ]
    assert operations.exponent(operations.naive_operations, 128) == pytest.approx(3, abs=0.05)
    assert operations.exponent(operations.dense_operations, 512) == pytest.approx(2, abs=0.05)
    assert operations.exponent(operations.chain_operations, 512) == pytest.approx(1, abs=0.02)
    assert counts[0] > 10 * counts[1]
    assert operations.dense_operations(4096) > 10 * operations.chain_operations(4096)


def test_the_exponent_crosses_over_at_sqrt_log_length():
    """Theorems 3.1 and 4.1 by counting: with d = log2 L and R = kappa^2 ln L, log k / log L is a
    matter of kappa.
    """
    table = {}
    for power in (16, 32, 64):
        for kappa in (0.1, 0.3, 1.0, 3.0):
            degree = needed.degree_needed(kappa**2 * power * math.log(2), 2.0**-power)
            assert (
                needed.remainder(degree, kappa**2 * power * math.log(2), "chebyshev") <= 2.0**-power
            )
            table[power, kappa] = needed.width_exponent(power, degree, power * math.log(2))
    for power in (16, 32, 64):
        exponents = [table[power, kappa] for kappa in (0.1, 0.3, 1.0, 3.0)]
        assert exponents == sorted(exponents)
        assert exponents[0] < 1 < exponents[2]
        for kappa in (0.1, 0.3, 1.0, 3.0):
            assert table[power, kappa] == pytest.approx(needed.limit_exponent(kappa**2), rel=0.35)
    limits_ = [needed.limit_exponent(10.0**-n) for n in range(0, 60, 10)]
    assert limits_ == sorted(limits_, reverse=True)  # to 0 as R / ln L does, though slowly
    assert limits_[-1] < 0.1
    assert needed.degree_needed(1e-12, 0.5) == 0
    with pytest.raises(ValueError, match="radius: got 800"):
        needed.degree_needed(800.0, 0.1)


def test_norms_are_those_of_the_theorems():
    p = problems.make(3, shape=problems.CROSS, reach=2.0)
    report = quick_jit(ll.norm_report)(p)
    q, k, _ = (np.asarray(x) for x in projections(p))
    update = p.scale * p.x_query @ p.adapters["query"].b @ p.adapters["query"].a
    got = [float(x) for x in (report.query, report.key, report.query_update)]
    np.testing.assert_allclose(got, [np.abs(x).max() for x in (q, k, update)], rtol=1e-12)


def test_attention_in_x_is_a_lora_problem():
    """Definition E.1 and Appendix E: the embedding by hand, by automatic differentiation, and by
    the library.
    """
    assert limits.definition_e_1().holds
    assert limits.embedding().holds
    got = limits.attention_gradient()
    assert got.shape == (3, 3)
    assert isinstance(jnp.asarray(got), jax.Array)


def test_a_large_norm_may_be_easy():
    """Remark 5.2's conditions are sufficient; keys that are only shifted break them at no cost."""
    assert conditions.far_above().holds


def test_the_theorems_are_checked_inside_their_hypotheses():
    """And where a lower degree would not do: else the check could not fail."""
    for adapt in (row.PARTIAL, row.FULL):
        report = quick_jit(ll.norm_report)(row.bounded(adapt))
        norm = report.gamma_full if adapt == row.FULL else report.gamma
        assert float(norm) <= 1.5 * (1 + 1e-12)
        assert approximation.relative_errors(adapt, 2)[0] > 1 / approximation.LENGTH
    assert row.sampled().x_key.shape[0] == approximation.LENGTH


def test_printed_forms_are_wrong_by_more_than_a_tenth():
    for check in (
        corrections.transposed_q,
        corrections.diagonal_on_the_right,
        corrections.key_side,
    ):
        evidence = check()
        assert evidence.holds
        assert float(evidence.measured.split()[2].rstrip(",")) > 0.1


def test_both_percentages_of_table_1_are_right():
    evidence = corrections.table_1()
    assert evidence.holds
    assert evidence.measured == "saved 5.2, 11.6, 25.0 %; faster 5.5, 13.1, 33.3 %"
