"""Real heads by the model that they are of: an encoder (minilm.py) and a decoder (smollm2.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import Refused
from experiments.problems import minilm, smollm2

MODELS: dict[str, Any] = {"encoder": minilm, "decoder": smollm2}
MADE_BY = {"encoder": "make_minilm_heads.py", "decoder": "make_smollm2_heads.py"}


def path(model: str, given: str, field: str) -> Path:
    """The file of a model's heads: the one given, or the one embedded for "".

    Raises Refused, naming the field, for a file that is not there.
    """
    if not given:
        return MODELS[model].PATH
    if not Path(given).is_file():
        made = f"a file made by experiments/data/{MADE_BY[model]}"
        raise Refused(f"{field}: got {given!r}, expected {made}")
    return Path(given)


def spread(path: Path, most: int) -> list[tuple[int, int]]:
    """`most` heads of each layer, spread evenly from tame to wild, both ends among them."""
    every = minilm.heads(path)
    chosen = []
    for layer in dict.fromkeys(layer for layer, _ in every):
        own = [pair for pair in every if pair[0] == layer]
        gaps = max(most - 1, 1)
        places = {round(i * (len(own) - 1) / gaps) for i in range(min(most, len(own)))}
        chosen += [own[place] for place in sorted(places)]
    return chosen


def check_lengths(field: str, lengths: tuple[int, ...], path: Path) -> None:
    """Raises Refused for a length beyond the tokens of the file."""
    most = minilm.tokens(path)
    if max(lengths, default=1) > most:
        got = f"got {max(lengths)}, expected at most {most}, the tokens there are"
        raise Refused(f"{field}: {got}; longer files: experiments/data/README.md")
