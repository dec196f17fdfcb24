"""Theorems 3.1 and A.1 as counts: operations, the largest array, memory, all without running
anything long.
"""

import functools

import jax
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.coordinates import sampling
from lora_limits.gradients import exact
from lora_limits.instruments.counting import count_operations
from lora_limits.polynomial import monomials
from tests.support.tools import QUICK, later

WIDTH, INPUTS, RANK = 4, 8, 2


def specification(length, adapt=problems.FULL, dtype=np.float32):
    """A problem of shapes without numbers."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, w = array(length, INPUTS), array(INPUTS, WIDTH)
    adapters = {n: ll.Adapter(array(RANK, WIDTH), array(INPUTS, RANK)) for n in adapt}
    return ll.LoRAProblem(
        x,
        x,
        x,
        array(length, WIDTH),
        weights=ll.AttentionWeights(w, w, w),
        adapters=adapters,
        scale=1.0,
        beta=0.25,
    )


@functools.cache
def counted(method, length, adapt=problems.FULL):
    return count_operations(lambda p: ll.gradient(p, method), specification(length, adapt))


def exponent(method, adapt=problems.FULL):
    """Slope of log operations over log L, L = 2^9, 2^11 and 2^13, by least squares."""
    lengths = 2 ** np.arange(9, 14, 2)
    flops = [counted(method, int(n), adapt)["flops"] for n in lengths]
    return np.polyfit(np.log(lengths), np.log(flops), 1)[0]


# ------------------------------------------------------------------------------------ the counter


def test_the_counter_multiplies_scans_out_and_takes_the_dearest_branch():
    a, b = np.ones((3, 5)), np.ones((5, 7))

    def loop(x, y):
        total, _ = jax.lax.scan(lambda c, _: (c + (x @ y).sum(), None), 0.0, None, length=11)
        return total

    assert count_operations(lambda x, y: x @ y, a, b) == {"flops": 2 * 3 * 5 * 7, "largest": 21}
    assert count_operations(loop, a, b) == {"flops": 11 * 2 * 3 * 5 * 7, "largest": 21}
    assert count_operations(jax.jit(loop), a, b)["flops"] == 11 * 2 * 3 * 5 * 7
    assert (
        count_operations(lambda x, y: jax.lax.map(lambda r: r @ y, x), a, b)["flops"]
        == 2 * 3 * 5 * 7
    )

    def branch(x, y, flag):
        return jax.lax.cond(flag, lambda: (x @ y).sum(), lambda: (x @ y).sum() + (x.T @ x).sum())

    assert count_operations(branch, a, b, True)["flops"] == 2 * 3 * 5 * 7 + 2 * 5 * 3 * 5
    with pytest.raises(ValueError, match="while loop"):
        count_operations(lambda x: jax.lax.while_loop(lambda v: v.sum() < 9, lambda v: v + 1, x), a)


# ------------------------------------------------------------------------------------- operations


def test_the_exact_gradient_takes_quadratic_time():
    for method in (ll.Exact(), ll.Exact(block_size=64)):
        assert exponent(method) == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("series", ["taylor", *later("chebyshev", "fitted")])
@pytest.mark.parametrize(
    "adapt", [problems.PARTIAL, problems.FULL], ids=["Theorem 3.1", "Theorem A.1"]
)
def test_the_polynomial_gradient_takes_almost_linear_time(series, adapt):
    assert exponent(ll.Polynomial(3, series), adapt) <= 1.05


def test_the_gradient_itself_costs_a_few_times_k_and_d_a_token():
    """O(L k (1 + d + r)) with a constant below 20, and the break-even with exact attention is at a
    length near k.
    """
    k = monomials.count(WIDTH, 3)
    length = 2**13
    flops = count_operations(
        lambda p: ll.gradient(p, ll.Polynomial(3)).gradient, specification(length, problems.FULL)
    )["flops"]
    assert flops < 2 * 20 * length * k * (1 + WIDTH + RANK)
    assert flops < counted(ll.Exact(), length)["flops"] / 50


# ----------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "method",
    [ll.Polynomial(3), *later(ll.Polynomial(3, "fitted"), ll.Polynomial(2, block_size=64))],
)
def test_no_intermediate_grows_with_the_length(method):
    """Not L x L, not L x k^2, not even L x k or L x d: k columns, or a block of features."""
    k = monomials.count(WIDTH, method.degree)
    largest = counted(method, 4096)["largest"]
    assert largest == counted(method, 8 * 4096)["largest"]
    derivatives = WIDTH * max(
        1 + WIDTH + RANK, 11
    )  # of what is evaluated (11: the certificate), by every variable
    below = monomials.count(WIDTH, method.degree - 1)
    sweeps = max(k * (INPUTS + 1 + RANK), derivatives * below) + (method.block_size or 2048) * max(
        k + INPUTS, derivatives
    )
    if method.series == "taylor":
        assert largest <= max(sweeps, sampling.SIZE * INPUTS)
    else:  # "fitted" looks at 64 x SAMPLE scores, a few times over
        assert largest <= max(sweeps, 4 * 64 * sampling.SIZE)


def test_the_dense_gradient_is_seen_to_form_the_attention_matrix():
    assert counted(ll.Exact(), 4096)["largest"] == 4096**2


def test_the_tiled_gradient_holds_no_more_than_rows_and_tiles():
    for length in (4096, 16384):
        assert counted(ll.Exact(block_size=256), length)["largest"] <= max(length * INPUTS, 256**2)


# ----------------------------------------------------------------------------------------- memory


def temporary_bytes(function, length, **options):
    """What the compiled program allocates besides arguments and results."""
    lowered = jax.jit(function).lower(specification(length, **options))
    return (
        lowered.compile(QUICK if jax.default_backend() == "cpu" else None)
        .memory_analysis()
        .temp_size_in_bytes
    )


def test_memory_of_the_polynomial_gradient_does_not_depend_on_the_length():
    short, long = (
        temporary_bytes(lambda p: ll.gradient(p, ll.Polynomial(3)), 2**n) for n in (15, 17)
    )
    assert long <= 1.1 * short
    assert long < 8e6  # two blocks of 2048 tokens and their features, in float64


def test_memory_of_the_tiled_gradient_is_linear_in_the_length():
    """Four times the tokens, four times the memory less the tiles; the dense one would need sixteen
    times.
    """
    short, long = (temporary_bytes(lambda p: exact.tiled_gradient(p, 256), 2**n) for n in (13, 15))
    assert 2 < long / short < 4.2
    assert long < 2**15 * 4 * 8 * (INPUTS + WIDTH) + 4 * 4 * 256**2


def test_memory_of_the_loss_is_linear_in_the_length():
    short, long = (temporary_bytes(ll.loss, 2**n) for n in (13, 15))
    assert long / short < 4.2
