"""`lora-limits solve FILE.cnf`: a SAT solver whose only means is the gradient of a LoRA adapter.

What it prints and its exit status are those of SAT competitions.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lora_limits.hardness import dimacs
from lora_limits.hardness.oracle import gradient_oracle
from lora_limits.hardness.sat import find_model, satisfies

SATISFIABLE, UNSATISFIABLE = 10, 20  # exit status


def _decided(formula: dimacs.Formula) -> tuple[bool, list[str]]:
    """Whether the formula is satisfiable, and the lines that say so, with a model and the cost."""
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
    return cost.satisfiable, lines


def _completed(model: list[int], variables: int) -> list[int]:
    """The model with a value for the variables in no clause too, which may take either."""
    used = {abs(x) for x in model}
    free = [x for x in range(1, variables + 1) if x not in used]
    return sorted([*model, *free], key=abs)


def solve_command(path: str) -> int:
    """Decides a DIMACS CNF file, "-" for standard input; prints the answer, a verified model, cost.

    Returns 10 for satisfiable, 20 for unsatisfiable; 2, after one line on stderr, for a file that
    cannot be read, is no DIMACS CNF, or has more than 24 variables in its clauses.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        satisfiable, lines = _decided(dimacs.parse(dimacs.decode(data)))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"error: {'standard input' if path == '-' else path}: {reason}", file=sys.stderr)
        return 2
    # At once, so that a reader that has gone is met here and not as the process ends.
    print("\n".join(lines), flush=True)
    return SATISFIABLE if satisfiable else UNSATISFIABLE
