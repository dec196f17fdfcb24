"""The command `lora-limits`: a table of subcommands, each imported only when it is named."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from lora_limits import __version__
from lora_limits.arguments import Parser, integer, number

# subcommand: (module, function, help, {argument: options of argparse}); the function takes the
# arguments, in order, and returns the exit status
COMMANDS = {
    "theorems": (
        "lora_limits.ledger.command",
        "theorems_command",
        "every statement of the paper, with its verdict and the evidence for it",
        {
            "WORDS": {
                "nargs": "*",
                "help": "only rows whose number or statement contains them: Lemma 3",
            },
            "--json": {
                "action": "store_true",
                "help": "JSON lines, one object a row: number, statement, verdict, holds, measured, "
                "test, figure",
            },
        },
    ),
    "solve": (
        "lora_limits.hardness.command",
        "solve_command",
        "decide a DIMACS CNF file through LoRA gradients (Theorem 4.1)",
        {
            "FILE": {
                "help": "DIMACS CNF, - for standard input; exit status 10: satisfiable, "
                "20: unsatisfiable, 2: no answer"
            }
        },
    ),
    "diagnose": (
        "lora_limits.diagnose.command",
        "diagnose_command",
        "which heads of a real model would gain from approximate LoRA gradients (Remark 5.2)",
        {
            "MODEL_DIR": {"help": "a local Hugging Face model folder, weights in safetensors"},
            "--text": {"required": True, "metavar": "FILE", "help": "text to run it on, UTF-8"},
            "--labels": {
                "metavar": "FILE",
                "help": "classes of a classifier, one for each line of the text, which are then "
                "its examples (default: the loss of the model's own class)",
            },
            "--adapter": {
                "metavar": "DIR",
                "help": "LoRA adapter that peft wrote (default: a random one of rank 4)",
            },
            "--tolerance": {
                "type": number,
                "default": 0.1,
                "metavar": "T",
                "help": "relative error (default: 0.1)",
            },
            "--length": {
                "type": integer,
                "metavar": "N",
                "help": "tokens a window (default: the model's most, up to 2048); where longer texts "
                "would pay they are tried too, up to 8192 tokens, which may take most of the time",
            },
            "--batch": {
                "type": integer,
                "metavar": "N",
                "help": "windows (default: 4, or what the text fills)",
            },
            "--layers": {
                "metavar": "LIST",
                "help": "layers to look at: all, or 0,3,7-9 (default: all heads of 96 or fewer, "
                "else 48 spread over all layers)",
            },
            "--heads": {"metavar": "LIST", "help": "heads to look at in each layer: all, or 0-3"},
            "--table": {
                "action": "store_true",
                "help": "print a row for each head too, and the checklist that leads to a decision",
            },
            "--out": {
                "metavar": "DIR",
                "help": "where to write diagnosis.html, diagnosis.png and diagnosis.json",
            },
        },
    ),
    "pilot": (
        "lora_limits.pilot.command",
        "pilot_command",
        "fine-tune a model by exact and by approximate gradients, side by side: go or no-go",
        {
            "MODEL_DIR": {"help": "a local Hugging Face model folder of BERT's or Llama's kind"},
            "--text": {"required": True, "metavar": "FILE", "help": "text to train on, UTF-8"},
            "--labels": {
                "metavar": "FILE",
                "help": "classes for an encoder, one for each line of the text, which are then its "
                "examples (a decoder learns to predict the next token)",
            },
            "--method": {
                "metavar": "M",
                "help": "of every layer: 'polynomial DEGREE' or 'block tree' (default: chosen layer "
                "by layer)",
            },
            "--steps": {"type": integer, "default": 100, "metavar": "N", "help": "steps (100)"},
            "--seeds": {
                "type": integer,
                "default": 3,
                "metavar": "S",
                "help": "runs a side (3); of one alone nothing is a go",
            },
            "--length": {
                "type": integer,
                "metavar": "L",
                "help": "tokens a sequence (default: the model's most, up to 2048; with labels what "
                "half of the lines have)",
            },
            "--batch": {
                "type": integer,
                "default": 4,
                "metavar": "B",
                "help": "sequences a step (4)",
            },
            "--rank": {
                "type": integer,
                "default": 4,
                "metavar": "r",
                "help": "of the adapters (4)",
            },
            "--targets": {
                "default": "q,v",
                "metavar": "LIST",
                "help": "projections with adapters (default: q,v)",
            },
            "--rate": {
                "type": number,
                "default": 1e-3,
                "metavar": "X",
                "help": "largest learning rate of Adam (1e-3)",
            },
            "--margin": {
                "type": number,
                "default": 0.01,
                "metavar": "X",
                "help": "how much worse is no worse, in accuracy or in loss a token (0.01)",
            },
            "--out": {
                "default": "results/pilot",
                "metavar": "DIR",
                "help": "where results and adapters are kept, and where the same command goes on "
                "(default: results/pilot)",
            },
        },
    ),
}


def _parser() -> Parser:
    parser = Parser(
        prog="lora-limits", description="The theorems of arXiv 2406.03136, made to run."
    )
    parser.add_argument("--version", action="version", version=f"lora-limits {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, _, text, arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        for argument, options in arguments.items():
            sub.add_argument(argument, **options)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status of the subcommand; 2 for bad arguments, 130 if it was interrupted, 143 if it was
    terminated.

    Imports nothing of a subcommand, JAX least of all, before its arguments are read.
    """
    given = _parser().parse_args(argv)
    module, function, _, arguments = COMMANDS[given.command]
    try:
        command = getattr(importlib.import_module(module), function)
        return command(*(getattr(given, argument.lstrip("-")) for argument in arguments))
    except BrokenPipeError:
        # The reader, `head` for one, has seen enough. What is left in the buffer goes nowhere, or
        # Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class Terminated(KeyboardInterrupt):
    """SIGTERM, which Python would end at without leaving a `with`."""


def program() -> None:
    """`main` as a process of its own, which ends with its status."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    status = main()
    if status > 128:
        # At once: threads of JAX are still at work, and taking down the interpreter beside them
        # crashes now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
