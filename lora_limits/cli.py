"""The command `lora-limits`: a table of subcommands, each imported only when it is named."""

from __future__ import annotations

import argparse
import importlib
import sys

# subcommand: (module, function, help, arguments); the function takes the arguments and returns the exit status
COMMANDS = {
    "theorems": (
        "lora_limits.theorems",
        "theorems_command",
        "every statement of the paper, with its verdict and the evidence for it",
        (),
    ),
    "solve": (
        "lora_limits.hardness.command",
        "solve_command",
        "decide a DIMACS CNF file through LoRA gradients (Theorem 4.1)",
        ("FILE",),
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Exit status of the subcommand; 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="lora-limits", description="The theorems of arXiv 2406.03136, made to run.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, _, text, arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        for argument in arguments:
            sub.add_argument(argument)
    given = parser.parse_args(argv)
    module, function, _, arguments = COMMANDS[given.command]
    return getattr(importlib.import_module(module), function)(*(getattr(given, a) for a in arguments))


if __name__ == "__main__":
    sys.exit(main())
