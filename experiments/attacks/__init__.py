"""Attacks on the certificate: inputs of every kind, hill climbing on error / bound, long sequences.

Each is a function (count, seed, dtype) -> {family: Tally} that never stops at a violation. A finite
bound that is below the error is one; an infinite bound promises nothing.
"""

from experiments.attacks.climbing import hill_climb
from experiments.attacks.directed import directed
from experiments.attacks.families import families
from experiments.attacks.long_sequences import long_sequences

ATTACKS = {
    "families": families,
    "hill climbing": hill_climb,
    "long sequences": long_sequences,
    "directed": directed,
}
