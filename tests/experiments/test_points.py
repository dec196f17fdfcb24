"""The points that a config makes: which fields are in the key of a row, and what is refused before any
is measured.
"""

from pathlib import Path

import pytest

from experiments import batch_and_rank, crossing, finetune, outlier_free
from experiments.__main__ import main
from experiments.runner.note import load, override
from tests.support import ROOT


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: crossing.Config(rates=(), ranks=(1,), alphas=(1.0,)), "rates"),
        (
            lambda: batch_and_rank.Config(
                degrees=(0,), ranks=(), batches=(1,), norms=("free",), seeds=1
            ),
            "ranks",
        ),
        (lambda: outlier_free.Config(ranks=()), "ranks"),
        (
            lambda: case(tasks={"which_module": 256}, base_length=64),
            "expected squares, of digits alone",
        ),
        (lambda: case(tasks={"digits": 256}, base_length=65), "expected squares, of digits alone"),
    ],
)
def test_what_the_points_of_an_experiment_cannot_be_made_of_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        # What of the sizes of adapters is wide enough.
        ("norm_rank", "inputs", 32),
        # Which attentions are timed side by side.
        ("outlier_free", "attentions", ["softmax"]),
        # What the degree of the sweep's name is.
        ("scaling", "degree", 5),
    ],
)
def test_a_field_that_measure_reads_makes_other_rows(name, field, value):
    sweep = load(ROOT / "configs" / f"{name}.toml", "smoke")
    changed = override(sweep, {field: value})
    assert sweep.identity()["fields"][field] != changed.identity()["fields"][field] == value


def test_a_field_that_only_makes_points_or_names_a_place_keeps_the_rows():
    sweep = load(ROOT / "configs" / "batch_and_rank.toml", "smoke")
    assert override(sweep, {"seeds": 9, "cache": "elsewhere"}).identity() == sweep.identity()


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("scaling", "--lengths 1", "--lengths: got 1, expected greater than or equal to 2"),
        ("certificates", "--shapes [1,4]", "--shapes: got 1, expected greater than or equal"),
        ("real_heads", "--length 513", "--length: got 513, expected less than or equal to 512"),
        (
            "real_heads",
            "--decoder_lengths [2049]",
            "decoder_lengths: got 2049, expected at most 2048, the tokens there are; longer",
        ),
        ("real_heads", "--decoder none", "decoder: got 'none', expected a file made by"),
        (
            "factors",
            "--lengths 513",
            "lengths: got 513, expected at most 512, the tokens there are; --in",
        ),
        ("factors", "--inputs none", "inputs: got 'none', expected a file made by"),
        ("chain_errors", "--degrees -1", "--degrees: got -1, expected greater than or equal to 0"),
        ("hardness", "--lengths 3", "--lengths: got 3, expected greater than or equal to 4"),
        ("batch_and_rank", "--length 65", "command line: length of digits: got 65, expected 64"),
        (
            "sensitivity",
            '--lengths {"next_byte":9000}',
            "command line: length of next_byte: got 9000, expected 4 to 8192",
        ),
        ("crossing", "--length 1", "command line: length of which_module: got 1, expected 4"),
        ("outlier_free", "--timed 9999", "command line: length of next_byte: got 9999"),
    ],
)
def test_a_length_that_no_point_can_have_is_refused_before_any_is_measured(
    tmp_path, capsys, name, flags, said
):
    path = str(ROOT / "configs" / f"{name}.toml")
    out = str(tmp_path / "out")
    assert main([path, "--smoke", "--out", out, *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(said)
    assert not Path(out).exists()


def test_the_shortest_points_that_are_taken_can_be_measured():
    """Below it, `hardness` refuses: its gadget has no room."""
    sweep = override(load(ROOT / "configs" / "hardness.toml", "smoke"), {"lengths": [4]})
    point = next(point for point in sweep.experiment.points(sweep.config) if point["n"] == 4)
    assert sweep.experiment.measure(point, sweep.config)["decisions"] > 0


def case(**fields):
    return finetune.Case(pretrain_steps=1, steps=1, **fields)
