"""Rows as a table for plots of one's own, with a data frame's library and without."""

import sys
import types

import pytest

from experiments import Refused
from experiments.__main__ import main
from experiments.runner.table import FRAMES, table
from paper_figures.command.finding import STORED


@pytest.fixture
def bare(monkeypatch):
    """As if no data frame's library were installed."""
    for name in FRAMES:
        monkeypatch.setitem(sys.modules, name, None)


def test_a_line_a_point_with_columns_of_points_metrics_and_fields(toy, bare):
    main(["toy.toml", "--out", "out", "--seed", "3", "--failing", "2"])
    lines = table("out")
    assert [line["point.length"] for line in lines] == [1, 3, 4, 5, 6, 7]
    assert lines[0]["metrics.value"] == 4.0
    assert lines[0]["fields.seed"] == 3
    assert {"seconds", "version", "key", "run", "fields.series"} <= lines[0].keys()
    assert len({tuple(line) for line in lines}) == 1


def test_kept_rows_are_read_too_and_what_lies_inside_has_dots(bare):
    lines = table(STORED / "scaling.jsonl")
    assert lines[0]["metrics.methods.polynomial.seconds"] > 0
    # Columns that a row lacks are there.
    assert len({tuple(line) for line in lines}) == 1
    with pytest.raises(Refused, match="got no such folder"):
        table("nowhere")


@pytest.mark.parametrize("name", FRAMES)
def test_a_data_frame_where_there_is_a_library_for_it(toy, bare, monkeypatch, name):
    main(["toy.toml", "--out", "out"])
    stand_in = types.SimpleNamespace(DataFrame=lambda lines, **_: (name, lines))
    monkeypatch.setitem(sys.modules, name, stand_in)
    assert table("out")[0] == name
    assert len(table("out")[1]) == 7
