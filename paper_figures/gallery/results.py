"""The long table of results: every line computed from the kept rows of a config."""

from __future__ import annotations

from collections.abc import Callable

from paper_figures.command.finding import STORED, load
from paper_figures.drawing.tables import markdown
from paper_figures.gallery import limits, promises, speed, training
from paper_figures.gallery.saying import Line, Rows

# (config, what to say of its rows), in the order of the table
LINES: tuple[tuple[str, Callable[[Rows], list[Line]]], ...] = (
    ("scaling", speed.adapters),
    ("scaling", speed.exponents),
    ("peers", speed.grid),
    ("peers", speed.long),
    ("peers", speed.rivals),
    ("accelerator", speed.accelerator),
    ("accelerator", speed.overtaken),
    ("certificates", limits.certificates),
    ("promises", promises.bounds),
    ("promises", promises.attacks),
    ("phase_boundary", limits.crossings),
    ("phase_boundary", limits.boundary_speed),
    ("phase_boundary", limits.law),
    ("phase_boundary", limits.counted),
    ("levels", limits.levels),
    ("rates", speed.rates),
    ("norm_rank", limits.norms),
    ("chain_errors", limits.chain),
    ("hardness", limits.hardness),
    ("real_heads", limits.real_heads),
    ("factors", training.tree),
    ("factors", training.sparse),
    ("factors", training.factor_speed),
    ("factors", training.decoder),
    ("factors", training.failures),
    ("diagnose", training.diagnosis),
    ("diagnose_decoder", training.diagnosis),
    ("finetune", training.long_steps),
    ("finetune", training.short_runs),
    ("batch_and_rank", training.noise),
    ("sensitivity", training.tasks),
    ("crossing", training.passing),
    ("outlier_free", training.outliers),
    ("pilot", training.pilots),
)


HEADER = ("what", "measured", "rows")


def kept(config: str) -> Rows:
    """The kept rows of a config. Raises ValueError where there are none."""
    rows = load(STORED, config)
    if rows is None:
        raise ValueError(f"rows of {config}: got none in {STORED.name}/, expected those kept there")
    return rows


def lines() -> list[list[str]]:
    """The lines of the table, as HEADER has them. Raises ValueError where rows are missing."""
    out = []
    for config, say in LINES:
        out += [[what, measured, f"`{config}`"] for what, measured in say(kept(config))]
    return out


def table(computed: list[list[str]]) -> str:
    """The table in Markdown, of its lines."""
    return markdown(HEADER, computed)
