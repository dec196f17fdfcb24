"""Every figure on part of its rows, as a sweep that was stopped, a shard or a failed point leaves
them: what there is is drawn, without a warning, what is missing is said, and a pair is never made of
two seeds.
"""

import random

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from paper_figures import finetune, sensitivity
from paper_figures.command.finding import STORED, available, find, load
from paper_figures.drawing import style

FIGURES = [name for name in available() if (STORED / f"{name}.jsonl").is_file()]


def data(ax):
    """Every finite point, bar and cell of a panel; lines across all of it are no data."""
    places = [line.get_xydata() for line in ax.lines if line.get_transform() == ax.transData]
    places += [patch.get_bbox().get_points() for patch in ax.patches if hasattr(patch, "get_bbox")]
    for marks in ax.collections:
        # of scattered points the paths are their marks, and of all others the offsets are 0
        scattered = isinstance(marks, PathCollection)
        places += [marks.get_offsets()] if scattered else [p.vertices for p in marks.get_paths()]
    places = np.concatenate([np.zeros((0, 2)), *(np.ma.filled(x, np.nan) for x in places)])
    cells = [c.get_array() for c in [*ax.collections, *ax.images] if c.get_array() is not None]
    cells = np.concatenate([np.zeros(0), *(np.ma.filled(x, np.nan).ravel() for x in cells)])
    finite = np.isfinite(places).all(1)
    return places[finite].tolist() + cells[np.isfinite(cells)].tolist()


def says(ax):
    return {text.get_text() for text in ax.texts}


def draw(name, rows, *, render=False):
    """Draw a figure, and write its table, of these rows alone; what its panels hold and say.

    Every panel holds data, or says that it has none.
    """
    module = find(name)
    also = {config: load(STORED, config) or [] for config in getattr(module, "ALSO", ())}
    figure = module.draw(rows, also) if also else module.draw(rows)
    style.say_where_empty(figure)
    if render:
        figure.draw_without_rendering()
    if hasattr(module, "table"):
        assert module.table(rows).count("\n") > 1
    panels = [ax for ax in figure.axes if ax.axison]
    held = [(data(ax), says(ax)) for ax in panels]
    for number, (numbers, words) in enumerate(held):
        assert numbers or words, f"panel {number} is empty and does not say so"
        assert not numbers or "no rows yet" not in words, f"panel {number} has rows"
    style.plt.close(figure)
    return held


def parts(rows):
    """Rows of one coordinate's value alone, and of all its others."""
    for name in {name for row in rows for name in row["point"]}:
        values = {repr(row["point"].get(name)) for row in rows}
        for value in sorted(values)[:3]:
            yield [row for row in rows if repr(row["point"].get(name)) == value]
            yield [row for row in rows if repr(row["point"].get(name)) != value]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_of_a_single_row(name):
    """And it is that row which is drawn: another one gives another figure, if one alone is drawn."""
    rows = load(STORED, find(name).CONFIG)
    first, last = draw(name, rows[:1]), draw(name, rows[-1:])
    assert first != last or len(rows) == 1 or not any(numbers for numbers, _ in [*first, *last])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_of_any_part_of_its_rows(name):
    rows = load(STORED, find(name).CONFIG)
    draws = random.Random(0)
    tried = [rows[n : n + 1] for n in range(0, len(rows), max(1, len(rows) // 6))]
    tried += [rows[: len(rows) // 2], rows[:-1], *(rows[n::3] for n in range(3))]
    tried += list(parts(rows))
    tried += [[row for row in rows if draws.random() < 0.4] for _ in range(2)]
    tried = [part for part in tried if part]
    # All of them would take a quarter of an hour.
    for number, part in enumerate(draws.sample(tried, min(24, len(tried)))):
        draw(name, part, render=number % 3 == 0)


def test_accuracies_are_compared_seed_by_seed():
    """Of runs of unlike seeds there is nothing to compare, however many there are of each."""
    rows = load(STORED, "finetune")
    whole = finetune.runs(rows, "short", "digits")
    assert len(finetune.over_exact(whole, "polynomial 2")) == len(whole["exact"]) >= 5

    def kept(row):
        point = row["point"]
        own = point["kind"] == "run" and point["method"] == "polynomial 2"
        return point["kind"] == "run" and (point["seed"] in (0, 1) if own else point["seed"] > 0)

    some = finetune.runs([row for row in rows if kept(row)], "short", "digits")
    by_seed = finetune.over_exact({n: {1: x[1]} for n, x in whole.items()}, "polynomial 2")
    assert finetune.over_exact(some, "polynomial 2") == by_seed


def test_a_mean_over_methods_is_of_the_seeds_they_share():
    rows = load(STORED, "sensitivity")
    task = sensitivity.tasks_of(rows)[0]
    names = sensitivity.common(rows)
    seeds = sorted(sensitivity.runs_of(rows, task, "exact"))

    def without(method, seed):
        gone = {"task": task, "method": method, "seed": seed}
        return lambda row: not gone.items() <= row["point"].items()

    # Exact training lacks one seed, every second method another: of as many runs, some are no pairs.
    some = [row for row in rows if without("exact", seeds[0])(row)]
    for place, method in enumerate(names):
        some = [row for row in some if without(method, seeds[place % 2])(row)]
    assert sensitivity.common(some) == names
    shared = set(seeds[2:])
    assert shared
    only = [row for row in rows if row["point"]["task"] != task or row["point"]["seed"] in shared]
    means = [sensitivity.lost(part, task)[0] for part in (some, only)]
    assert means[0] == pytest.approx(means[1])
