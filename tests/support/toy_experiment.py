"""An experiment for the runner's tests: quick, without jax, with points that fail and metrics that
are not finite.
"""

import math
import time
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from experiments.runner.config import Fields

VERSION = 1
X64 = None
POINTS = ("lengths", "gamma")
PLACES = ("pause", "failing")  # what fails at one time may not at another
NOTE = """\
experiment = "tests.support.toy_experiment"
claim = "none"
command = "python -m experiments toy.toml"
minutes = {smoke = 0.1, default = 1, full = 2}
expect = "nothing"
[default]
lengths = [1, 2, 3, 4, 5, 6, 7]
[smoke]
lengths = [1]
[full]
gamma = 2
"""


class Config(Fields):
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    gamma: float = 1.0
    series: Literal["taylor", "chebyshev"] = "taylor"
    seed: int = 0
    offset: float | None = None
    title: str = ""
    failing: tuple[int, ...] = ()
    pause: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def longest_below_a_thousand(self):
        if max(self.lengths) > 1000:
            raise ValueError(f"got lengths up to {max(self.lengths)}, expected at most 1000")
        return self


def points(config):
    return [{"length": length, "gamma": config.gamma} for length in config.lengths]


def measure(point, config):
    time.sleep(config.pause)
    if point["length"] in config.failing:
        raise MemoryError(f"length {point['length']} is too much\nfor the toy")
    if point["length"] == 999:
        raise KeyboardInterrupt
    value = (
        math.inf
        if point["length"] % 5 == 0
        else math.sqrt(point["length"]) * point["gamma"] + config.seed
    )
    return {
        "value": value,
        "nested": [{"nan": math.nan, "low": -math.inf}],
        "count": point["length"],
        "none": None,
    }
