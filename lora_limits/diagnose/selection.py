"""Which heads of a model are diagnosed: those asked for, or a sample spread over all layers."""

from __future__ import annotations

from collections.abc import Mapping

from lora_limits.checks import fail

MOST = 96  # heads that are all diagnosed where nothing is asked
SAMPLE = 48  # of more


def parse(option: str, text: str | None) -> set[int] | None:
    """ "0,3,7-9" as numbers; None for all. Raises ValueError for anything else."""
    if text is None or text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() for end in ends) or int(ends[0]) > int(ends[1]):
            fail(option, repr(text), "all, or numbers and ranges: 0,3,7-9")
        found |= set(range(int(ends[0]), int(ends[1]) + 1))
    return found


def select(
    heads: Mapping[int, int], layers: str | None, numbers: str | None
) -> dict[int, tuple[int, ...]]:
    """The heads of each layer that are diagnosed. heads: how many each layer has.

    Where neither option is given, all of MOST heads or fewer, else SAMPLE of them at even distances.
    Raises ValueError for options that name layers or heads that the model lacks, or none.
    """
    wanted_layers, wanted = parse("--layers", layers), parse("--heads", numbers)
    there = f"layers 0 to {max(heads)}, heads 0 to {max(heads.values()) - 1}"
    # One that is asked for and not there would be missed in the results, not in the command.
    if missing := sorted((wanted_layers or set()) - set(heads)):
        fail("--layers", f"{layers!r}, and there is no layer {missing[0]}", there)
    if missing := sorted((wanted or set()) - set(range(max(heads.values())))):
        fail("--heads", f"{numbers!r}, and there is no head {missing[0]}", there)
    pairs = [
        (layer, head)
        for layer, count in sorted(heads.items())
        for head in range(count)
        if (wanted_layers is None or layer in wanted_layers) and (wanted is None or head in wanted)
    ]
    if not pairs:
        fail("--layers and --heads", f"{layers or 'all'} and {numbers or 'all'}", there)
    if layers is None and numbers is None and len(pairs) > MOST:
        pairs = [pairs[round(n * (len(pairs) - 1) / (SAMPLE - 1))] for n in range(SAMPLE)]
    chosen: dict[int, tuple[int, ...]] = {}
    for layer, head in pairs:
        chosen[layer] = (*chosen.get(layer, ()), head)
    return chosen
