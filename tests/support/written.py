"""What a sweep wrote into a folder, for tests of the runner."""

import json
from pathlib import Path

from experiments.runner import store


def outcome(row):
    return {
        name: row.get(name)
        for name in ("key", "experiment", "version", "point", "status", "metrics", "error")
    }


def outcomes(folder):
    """Everything in a folder's rows but the seconds; through JSON, for NaN is not equal to
    itself.
    """
    return sorted(json.dumps(outcome(row)) for row in store.read(folder))


def lines(path):
    return Path(path).read_text().splitlines()
