"""Satisfiability from attention gradients: split and list, then orthogonal vectors.

Split the N variables in two halves. For each of the 2^(N/2) assignments of a half write one vector
over the clauses, 1 where the assignment does NOT satisfy the clause. An assignment of the left half
and one of the right satisfy the formula together iff no clause is missed by both, that is, iff
their vectors are orthogonal (Williams 2005). So a gradient in O(L^(2 - delta)) would decide k-SAT
in O(2^((1 - delta/2) N)): against SETH (Hypothesis 1, Theorem 4.1). By this direct route
R = Theta(log^2 L); R = Theta(log L) needs the gap of `nearest_neighbours` (distributed PCPs, not
executed here).

Formulas are lists of clauses, clauses lists of non-zero integers as in DIMACS: 3 is a variable, -3
its negation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from lora_limits.checks import fail
from lora_limits.hardness.deciders import Decision
from lora_limits.hardness.quadrature import Oracle
from lora_limits.hardness.vectors import Decider, orthogonal_vectors

Clauses = Sequence[Sequence[int]]
MAX_VARIABLES = 24
# Widths are rounded up to a multiple of this, with coordinates that are zero, so that compiled
# oracles serve again.
WIDTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a search spent."""

    satisfiable: bool  # the first answer
    decisions: int = 0
    calls: int = 0  # of the oracle
    tokens: int = 0  # summed over calls
    largest: int = 0  # L of the largest call
    score_bound: float = 0.0  # the largest R
    score_ratio: float = 0.0  # the largest R / ln L

    def add(self, decision: Decision) -> Cost:
        """The cost with one more decision in it."""
        return dataclasses.replace(
            self,
            decisions=self.decisions + 1,
            calls=self.calls + decision.calls,
            tokens=self.tokens + decision.calls * decision.tokens,
            largest=max(self.largest, decision.tokens),
            score_bound=max(self.score_bound, decision.score_bound),
            score_ratio=max(self.score_ratio, decision.score_ratio),
        )


def check_clauses(clauses: Iterable[Iterable[int]]) -> list[list[int]]:
    """The clauses as lists of Python integers. Raises ValueError for 0 and what is no integer."""
    out = []
    for index, clause in enumerate(clauses):
        literals = list(clause)
        for x in literals:
            if isinstance(x, bool) or not isinstance(x, int | np.integer) or x == 0:
                fail(f"clause {index}", f"literal {x!r}", "a non-zero integer")
        out.append([int(x) for x in literals])
    return out


def satisfies(model: Iterable[int], clauses: Clauses) -> bool:
    """Whether every clause has a literal in the model: O(size of the formula)."""
    true = set(model)
    return all(any(x in true for x in clause) for clause in clauses)


def variables_of(clauses: Clauses) -> list[int]:
    """The variables that occur, in order."""
    return sorted({abs(x) for clause in clauses for x in clause})


def assume(clauses: Clauses, literal: int) -> list[list[int]]:
    """The formula if `literal` is true: its clauses gone, its negation struck from the others."""
    return [[x for x in clause if x != -literal] for clause in clauses if literal not in clause]


def _half(clauses: Clauses, variables: Sequence[int]) -> Int[np.ndarray, "assignments clauses"]:
    """Vectors of one half, without duplicates: 1 where no literal of the clause is true."""
    codes = np.arange(2 ** len(variables))
    # the value of each variable in every assignment
    bit = {variable: (codes >> i & 1).astype(bool) for i, variable in enumerate(variables)}
    missed = np.ones((len(codes), len(clauses)), bool)
    for column, clause in enumerate(clauses):
        for literal in clause:
            if abs(literal) in bit:
                missed[:, column] &= bit[abs(literal)] != (literal > 0)
    # Packed, as sorting whole rows is what takes the time.
    packed = np.unique(np.packbits(missed, axis=1), axis=0)
    return np.unpackbits(packed, axis=1, count=len(clauses)).astype(np.int64)


def split_and_list(
    clauses: Clauses,
) -> tuple[Int[np.ndarray, "na width"], Int[np.ndarray, "nb width"]]:
    """(a, b) with an orthogonal pair iff the clauses can be satisfied.

    O(2^(N/2) m) for N variables and m clauses. Raises ValueError above 24 variables.
    """
    variables = variables_of(clauses)
    count = len(variables)
    if count > MAX_VARIABLES:
        tokens = 2 ** ((count + 1) // 2 + 1)
        expected = f"at most {MAX_VARIABLES}; {count} would take {tokens} tokens"
        fail("clauses", f"{count} variables", expected)
    left, right = variables[: count // 2], variables[count // 2 :]
    spare = -len(clauses) % WIDTH_STEP
    halves = (_half(clauses, left), _half(clauses, right))
    a, b = (np.pad(half, ((0, 0), (0, spare))) for half in halves)
    return a, b


def satisfiable(
    clauses: Iterable[Iterable[int]], oracle: Oracle, *, decider: Decider = "readout"
) -> Decision:
    """Can the clauses (DIMACS integers) be satisfied? O(N) calls on 2^(N/2) tokens.

    No clauses: yes; an empty clause: no; neither calls the oracle.
    Raises ValueError for zero or non-integer literals, and above 24 variables, naming the tokens
    that would take.
    """
    formula = check_clauses(clauses)
    if not formula or not all(formula):
        # Decided without an oracle, so no error of one could change it.
        margin = math.inf if not formula else -math.inf
        return Decision(not formula, 0, 0, 0.0, 0.0, margin, math.inf)
    return orthogonal_vectors(*split_and_list(formula), oracle, decider=decider)


def find_model(
    clauses: Iterable[Iterable[int]], oracle: Oracle, *, decider: Decider = "readout"
) -> tuple[list[int] | None, Cost]:
    """(literals that satisfy the clauses, or None; the cost), in N + 1 decisions at most.

    Variable x is true if the formula with x assumed is satisfiable, and false otherwise. The model
    is checked against the clauses before it is returned, so an oracle beyond its tolerance yields
    None beside cost.satisfiable = True, never a wrong model. Raises as `satisfiable` does.
    """
    formula = check_clauses(clauses)
    first = satisfiable(formula, oracle, decider=decider)
    cost = Cost(satisfiable=bool(first)).add(first)
    if not first:
        return None, cost
    model = []
    rest = formula
    for variable in variables_of(formula):
        decision = satisfiable(assume(rest, variable), oracle, decider=decider)
        # Given what was fixed before, one of both values works: no need to try the other.
        cost = cost.add(decision)
        model.append(variable if decision else -variable)
        rest = assume(rest, model[-1])
    return (model if satisfies(model, formula) else None), cost
