"""What a config says of itself, and what the manifest beside the kept rows says of their run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from paper_figures.command.finding import HERE, STORED

CONFIGS = HERE.parent / "configs"


class Note(NamedTuple):
    """A config. minutes: {size: about how long it takes on two cores}; fields: of each size."""

    claim: str
    command: str
    minutes: dict[str, float]
    fields: dict[str, dict[str, Any]]


def note(name: str, configs: Path = CONFIGS) -> Note:
    """What configs/NAME.toml says. Raises ValueError where there is none."""
    path = configs / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in configs.glob("*.toml"))
        raise ValueError(f"config: got {name!r}, expected one of {', '.join(known)}")
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    # smoke and full say what they have otherwise than default
    fields = {size: table["default"] | table.get(size, {}) for size in table["minutes"]}
    return Note(" ".join(table["claim"].split()), table["command"], table["minutes"], fields)


def names(configs: Path = CONFIGS) -> list[str]:
    """The configs there are."""
    return sorted(path.stem for path in configs.glob("*.toml"))


def how_long(chosen: list[str], size: str = "default") -> str:
    """One line: the minutes of some configs together, and of each."""
    each = {name: note(name).minutes[size] for name in chosen}
    listed = ", ".join(f"{name} {minutes:g}" for name, minutes in each.items())
    return f"about {sum(each.values()):g} minutes on two idle cores: {listed}"


def manifest(name: str) -> dict[str, Any] | None:
    """What is known of the run that left the kept rows; None for rows of another command."""
    path = STORED / f"{name}.manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def seeds(told: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How often chance was asked: seeds of the rows, else of the config."""
    config = told["config"]
    found = {row["point"]["seed"] for row in rows if "seed" in row["point"]}
    if found:
        text = f"{len(found)} seeds"
        # fewer of the long runs, where the config says so
        return text + (f" ({config['long_seeds']} at length)" if "long_seeds" in config else "")
    if "instances" in config:
        return f"{config['instances']} instances a point"
    if "seed" in config:
        return f"one seed ({config['seed']})"
    # A point may ask for several seeds itself, and a long one for fewer.
    asked = [row["point"].get("seeds", config["seeds"]) for row in rows]
    fewest = "" if min(asked) == max(asked) else f"{min(asked)} to "
    return f"{fewest}{max(asked)} seeds a point"


def otherwise(told: dict[str, Any]) -> str:
    """The fields that were given on the command line of the last run; "" for none."""
    asked = note(told["experiment"]).fields[told["size"]]
    given = told["config"]
    # the config's tables (of tasks) are filled up with defaults, so they say nothing here
    other = {
        name: given[name]
        for name, value in asked.items()
        if name in given and not isinstance(value, dict) and given[name] != value
    }
    text = ", ".join(f"{name} = {value}" for name, value in other.items())
    return f" (its last run with {text})" if text else ""


def run(told: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Size, rows, seeds, timed rounds, commit and device of a run, in one line."""
    config = told["config"]
    rounds = f", medians of up to {config['repeats']} timed rounds" if "repeats" in config else ""
    commit = f"commit {told['commit'][:8]}" if told["commit"] else "commit not recorded"
    commit += " with changes" if told["commit"] and told["dirty"] else ""
    device = f"{told['cpus']} CPU cores"
    if told.get("processor"):
        device += f" of {told['processor']}"
    if told["device"]["platform"] != "cpu":
        device = told["device"]["kind"]
    precision = "64 bits" if told["x64"] else "32 bits"
    # Rows of older versions do not say which fields they depend on.
    if any("fields" not in row for row in rows):
        commit += ", of a version whose rows do not say their fields"
    if len(told.get("runs", [])) > 1:
        commit += f"; {len(told['runs'])} runs merged"
    if told.get("missing"):
        commit += f"; {len(told['missing'])} points missing"
    made = f"Size {told['size']}{otherwise(told)}, {len(rows)} rows, {seeds(told, rows)}{rounds}"
    where = f"{device}, {precision}, jax {told['versions']['jax']}"
    return f"{made}; {where}; {commit}, {told['started'][:10]}"
