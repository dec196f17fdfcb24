"""The command line: python -m paper_figures [NAME ...] [--results DIR] [--out DIR] [--keep DIR]."""

import sys
from collections.abc import Sequence

from experiments.runner import terminal


def main(argv: Sequence[str] | None = None) -> int:
    """As `paper_figures.command.main`."""
    # Here, for what it imports takes a moment in which Ctrl-C must be heeded too.
    from paper_figures.command.main import main as run

    return run(argv)


if __name__ == "__main__":
    terminal.take_over()
    sys.exit(main())
