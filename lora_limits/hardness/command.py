"""`lora-limits solve FILE.cnf`: a SAT solver whose only means is the gradient of a LoRA adapter."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lora_limits.hardness import dimacs
from lora_limits.hardness.oracle import gradient_oracle
from lora_limits.hardness.sat import find_model, satisfies


def _lines(formula: dimacs.Formula) -> list[str]:
    start = time.perf_counter()
    model, cost = find_model(formula.clauses, gradient_oracle())
    if cost.satisfiable and model is None:
        told = "satisfiable, yet the model found fails"
        raise ValueError(f"the gradients contradict each other: {told}")
    lines = ["s SATISFIABLE" if cost.satisfiable else "s UNSATISFIABLE"]
    if model is not None:
        full = _completed(model, formula.variables)
        if not satisfies(full, formula.clauses):
            raise ValueError("the model found does not satisfy the formula")
        # A formula without variables has an empty model, which is written "v 0".
        lines.append(" ".join(["v", *map(str, full), "0"]))
    spent = time.perf_counter() - start
    lines.append(f"c gradients {cost.calls}, in {cost.decisions} decisions")
    lines.append(f"c tokens {cost.tokens}, {cost.largest} in the longest sequence")
    lines.append(f"c score bound R {cost.score_bound:.1f}, R / ln L {cost.score_ratio:.1f}")
    lines.append(f"c seconds {spent:.1f}")
    return lines


def _completed(model: list[int], variables: int) -> list[int]:
    """The model with a value for the variables in no clause too, which may take either."""
    used = {abs(x) for x in model}
    free = [x for x in range(1, variables + 1) if x not in used]
    return sorted([*model, *free], key=abs)


def solve_command(path: str) -> int:
    """Decides the DIMACS CNF file at `path`; prints the answer, a verified model, and the cost.

    Returns 0 when decided, whatever the answer; 2, after one line on stderr, for a file that cannot
    be read, is no DIMACS CNF, or has more than 24 variables in its clauses.
    """
    try:
        lines = _lines(dimacs.parse(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"error: {path}: {reason}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0
