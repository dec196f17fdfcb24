"""On an accelerator: the same gradients as on a CPU, its own kernels right to their precision,
nothing of size L x L.
"""

import jax
import numpy as np
import pytest

import lora_limits as ll
from experiments import accelerator
from experiments.contenders import baselines, kernels
from experiments.problems import conditioned as problems
from lora_limits.gradients import plan
from lora_limits.instruments import timing
from tests.support.tools import assert_close

pytestmark = pytest.mark.gpu

SHAPE = problems.Shape(lq=512, lk=512, inputs=(8, 8, 8), width=8, value_width=8, rank=2)


@pytest.fixture(scope="module")
def problem():
    return problems.make(1, shape=SHAPE, kind="self attention", dtype=np.float32)


def on_the_host(function, problem):
    """The value in float64 on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function)(jax.tree.map(lambda x: np.asarray(x, np.float64), problem))


@pytest.mark.parametrize(
    "method", [ll.Polynomial(2), ll.Polynomial(3, block_size=100), ll.Exact(128)], ids=str
)
def test_a_gradient_of_the_library_is_that_of_the_cpu_to_the_rounding_of_float32(method, problem):
    """A product that dropped to TF32 or bfloat16 would be off by 1e-3."""
    got = jax.jit(lambda p: ll.gradient(p, method).gradient)(problem)
    assert_close(got, on_the_host(lambda p: ll.gradient(p, method).gradient, problem), 1e-5)


def test_the_certificate_holds_on_the_accelerator(problem):
    result = jax.jit(lambda p: ll.gradient(p, ll.Polynomial(3)))(problem)
    exact = on_the_host(lambda p: ll.gradient(p, ll.Exact()).gradient, problem)
    assert result.bound is not None
    for bound, got, want in zip(
        *(jax.tree.leaves(x) for x in (result.bound, result.gradient, exact)), strict=True
    ):
        assert np.abs(np.asarray(got, np.float64) - np.asarray(want)).max() <= float(bound)


@pytest.mark.parametrize(
    ("attention", "precision", "tolerance"),
    [
        (kernels.xla, "highest", 1e-5),
        (kernels.xla, "tensorfloat32", 1e-2),
        (kernels.pallas, "highest", 1e-5),
        (kernels.cudnn, "highest", 5e-2),
    ],
    ids=["XLA", "TF32", "Pallas", "cuDNN"],
)
def test_the_kernels_agree_with_the_exact_gradient_to_their_precision(
    attention, precision, tolerance, problem
):
    if attention is not kernels.xla and jax.default_backend() != "gpu":
        pytest.skip("a kernel of GPUs")
    with jax.default_matmul_precision(precision), jax.numpy_dtype_promotion("standard"):
        got = jax.jit(lambda p: baselines.gradient(p, attention))(problem)
    assert_close(
        got, on_the_host(lambda p: ll.gradient(p, ll.Exact()).gradient, problem), tolerance
    )


def test_the_polynomial_gradient_needs_no_array_that_grows_with_the_length():
    """Two blocks or eight of them, the same working memory; a single L x L array would take 600 GB
    and up.
    """
    config, block = accelerator.Config(lengths=(1,)), 200_000
    sizes = []
    for length in (2 * block, 8 * block):
        problem = accelerator.make_problem(length, config)
        assert plan.block_size(problem, 3) == block
        compiled = jax.jit(lambda p: ll.gradient(p, ll.Polynomial(3))).lower(problem).compile()
        sizes.append(timing.temporary_bytes(compiled))
    assert sizes[1] <= 1.1 * sizes[0] < 2**30
