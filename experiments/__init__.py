"""Experiments, one module each, and the one runner for all of them: `python -m experiments
configs/NAME.toml`.

What a module must hold to be an experiment is written in `experiments.runner.experiment.Experiment`.
"""


class Refused(Exception):
    """What is asked for cannot be done as asked; the message is one line that says what was got and
    what was expected.

    On the command line it ends the run, before any point is measured, with exit status 2.
    """
