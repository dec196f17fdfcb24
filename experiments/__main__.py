"""The command line: python -m experiments configs/NAME.toml [flags]."""

import sys

from experiments.runner.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
