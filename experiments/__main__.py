"""The command line: python -m experiments configs/NAME.toml [flags]."""

import sys
from collections.abc import Sequence

from experiments.runner import terminal


def main(argv: Sequence[str]) -> int:
    """As `experiments.runner.command.main`."""
    # Here, for what it imports takes a moment in which Ctrl-C must be heeded too.
    from experiments.runner import command

    return command.main(argv)


if __name__ == "__main__":
    terminal.take_over()
    sys.exit(main(sys.argv[1:]))
