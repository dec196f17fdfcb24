"""The accelerator experiment where there is none: kernels step by step, limits and reasons, the
figure.
"""

import functools

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jax.extend import core

import lora_limits as ll
from experiments import accelerator
from experiments.contenders import baselines, kernels, truth
from experiments.problems import conditioned as problems
from lora_limits.gradients import plan
from paper_figures import accelerator as figure
from tests.support.tools import assert_close, quick_jit

SHAPE = problems.Shape(lq=32, lk=32, inputs=(3, 3, 3), width=3, value_width=2, rank=1)
CONFIG = accelerator.Config(
    lengths=(32,), degrees=(1,), blocks=(16,), tiles=(32,), width=2, rank=1, gamma=0.5
)


def dots(jaxpr):
    """Precisions of all products, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for sub in core.jaxprs_in_params(eqn.params):
            yield from dots(sub)


def test_the_pallas_kernel_padded_and_cut_again_has_the_exact_gradient():
    """Step by step, without its compiler: widths 3 and 2 in a kernel that wants 16 of each."""
    problem = problems.make(0, shape=SHAPE, dtype=np.float32)
    attention = functools.partial(kernels.pallas, interpret=True)
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        got = quick_jit(lambda p: baselines.gradient(p, attention))(problem)
    assert_close(got, quick_jit(lambda p: ll.gradient(p, ll.Exact()).gradient)(problem), 3e-6)


@pytest.mark.parametrize(("name", "lowest"), [("XLA", "HIGHEST"), ("XLA, TF32", "HIGH")])
def test_every_product_has_the_precision_its_row_states(name, lowest):
    """Backwards too, and TF32 in the attention alone."""
    contender, problem = (
        accelerator.contenders(CONFIG)[name],
        problems.make(0, shape=SHAPE, dtype=np.float32),
    )
    found = []

    def traced(problem):
        found.extend(dots(jax.make_jaxpr(contender.function)(problem).jaxpr))
        return problem.target

    kernels.attempt(contender._replace(function=traced, kernel=False), problem, 1e9)
    assert {p for pair in found for p in pair} == {
        jax.lax.Precision.HIGHEST,
        getattr(jax.lax.Precision, lowest),
    }
    assert sum(pair[0].name == lowest for pair in found) >= 6


def test_what_cannot_be_run_says_why_and_stops_nothing():
    def refuse(problem):
        raise NotImplementedError("no such head\nat all")

    problem = problems.make(0, shape=SHAPE, dtype=np.float32)
    for contender, most, said in (
        (kernels.Contender("exact", refuse), 1e9, "NotImplementedError: no such head"),
        (kernels.Contender("exact", refuse, kernel=True), 1e9, "needs a GPU, and this is cpu"),
        (
            kernels.Contender("exact", lambda p: (p.target @ p.target.T @ p.target,)),
            100.0,
            "of working memory",
        ),
    ):
        metrics, program, value = kernels.attempt(contender, problem, most)
        assert said in metrics["left_out"]
        assert program is value is None


def test_longer_inputs_are_left_out_by_the_time_of_shorter_ones(monkeypatch):
    monkeypatch.setattr(accelerator, "pilot_seconds", lambda name, config: 0.25)
    n = accelerator.PILOT
    reasons = [accelerator.too_long("XLA", factor * n, CONFIG) for factor in (1, 3, 4)]
    assert reasons == [None, None, "would take about 4 s"]


def test_on_an_accelerator_a_block_is_an_equal_part_of_the_input_and_as_long_as_memory_allows(
    monkeypatch,
):
    problem = jax.eval_shape(
        lambda: accelerator.make_problem(300_000, accelerator.Config(lengths=(2,)))
    )
    assert plan.block_size(problem, 3) == 2048
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plan.block_size(problem, 3) == 150_000  # of at most 2^25 / 165
    assert plan.block_size(problem, 2) == 300_000


def test_no_contender_is_held_against_itself(monkeypatch):
    monkeypatch.setattr(truth, "FLOAT64_LENGTH", 16)
    monkeypatch.setattr(
        accelerator, "contenders", lambda config: kernels.contenders(config.tiles, {}, config.width)
    )
    metrics = accelerator.measure({"length": 32}, CONFIG.model_copy(update={"repeats": 1}))
    assert metrics["reference"] == "tiled 32"
    assert [n for n, m in metrics["methods"].items() if "seconds" in m and "error" not in m] == [
        "tiled 32"
    ]


def test_every_length_is_a_point_of_this_device_and_a_cpu_is_announced_in_one_line(capsys):
    config = CONFIG.model_copy(update={"lengths": (64, 32, 64)})
    assert accelerator.points(config) == [
        {"length": 32, "device": "cpu"},
        {"length": 64, "device": "cpu"},
    ]
    said = capsys.readouterr().err
    assert said.startswith("no accelerator found: Pallas, cuDNN and TF32 are left out")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_an_error_estimated_where_no_exact_gradient_fits_is_near_the_true_one(monkeypatch):
    monkeypatch.setattr(accelerator, "SAMPLED", 4096)
    problem = accelerator.make_problem(32, CONFIG)
    got = accelerator.estimates(problem, CONFIG)
    method = accelerator.polynomials(CONFIG)["degree 1"]
    true = truth.of_gradient(ll.gradient(problem, ll.Exact()).gradient)
    error = truth.errors(quick_jit(lambda p: ll.gradient(p, method).gradient)(problem), true)[
        "max_error"
    ]
    assert error < got["degree 1"] < 2 * error


# ----------------------------------------------------------------------------------------- figure


def row(length, device="fast", platform="gpu", **methods):
    plain = {"family": "exact", "dtype": "float32", "precision": "highest"}
    metrics = {"device": device, "platform": platform}
    return {
        "point": {"length": length},
        "metrics": metrics | {"methods": {n: plain | m for n, m in methods.items()}},
    }


def test_the_figure_is_of_one_device_and_draws_what_its_rows_hold():
    ours = {"family": "polynomial", "seconds": 1.0}
    rows = [
        row(
            8,
            cudnn={"dtype": "bfloat16", "seconds": 2.0, "max_error": 0.01},
            ours=ours | {"max_error": 1e-4},
        ),
        row(
            16,
            cudnn={"dtype": "bfloat16", "left_out": "too long"},
            ours=ours | {"estimated_error": 2e-4},
        ),
        row(4, "slow", "cpu", dense={"seconds": 3.0, "max_error": 1e-6}),
    ]
    drawn = figure.draw([rows[2], rows[1], rows[0]])
    time, error = drawn.axes
    assert drawn.get_suptitle() == "fast"
    curves = {line.get_label(): line.get_xydata().tolist() for line in time.lines}
    assert curves == {
        "cudnn (bfloat16)": [[8, 2]],
        "ours": [[8, 1], [16, 1]],
    }
    assert [text.get_text() for text in error.texts] == [
        "bfloat16",
        "hollow: upper end of an estimate",
    ]
    assert error.lines[0].get_ydata() == [0.01, 0.01]
    assert error.lines[1].get_xydata().tolist() == [[8, 1e-4], [16, 2e-4]]
    assert error.lines[2].get_xydata().tolist() == [[16, 2e-4]]  # hollow: estimated
    plt.close(drawn)
