"""The gradient of tokens that come in chunks is that of the whole sequence."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.certificate import rounding
from lora_limits.gradients import plan, streamed
from lora_limits.problem import as_jax
from tests.support.compiled import GRADIENT, UNBOUNDED
from tests.support.tools import assert_close, later

TOKENS = ("x_query", "x_key", "x_value", "target")
LONG = problems.Shape(lq=31, lk=31, inputs=(4, 5, 3), width=3, value_width=2, rank=2)
EVEN = dataclasses.replace(
    LONG, lq=32, lk=32
)  # halves are chunks of one shape, which are compiled once


def cut(p, *bounds):
    """The problem as chunks of tokens, which end at the bounds."""
    edges = [0, *bounds, None]
    return [
        jax.tree_util.tree_map_with_path(
            lambda path, x, a=a, b=b: x[a:b] if path[0].name in TOKENS else x, p
        )
        for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("adapt", [("query",), problems.FULL, *later((problems.PARTIAL,))])
@pytest.mark.parametrize("kind", ["gaussian", "large biases"])
def test_chunks_give_what_the_whole_gives(kind, adapt):
    p = problems.make(5, shape=LONG, adapt=adapt, kind=kind, reach=1.5)
    method = ll.Polynomial(4, block_size=8)
    want = UNBOUNDED(p, method)
    told = []
    got = ll.streamed_gradient(
        lambda: iter(cut(p, 12, 24)),
        method,
        certified=False,
        progress=lambda name, tokens: told.append((name, tokens)),
    )
    assert_close(got.gradient, want.gradient, 1e-10)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-11)
    assert got.rank == want.rank
    assert (got.bound, got.normaliser) == (None, None)
    passes = ["mean", "centres", "keys", "queries"] + ["keys again"] * (adapt != ("query",))
    assert told == [(name, tokens) for name in passes for tokens in (12, 24, 31)]


def test_chunks_are_promised_what_the_whole_is():
    """A short chunk first: rounding is counted by the longest."""
    p = problems.make(5, shape=LONG, adapt=problems.FULL, kind="large biases", reach=1.5)
    method = ll.Polynomial(4, block_size=8)
    want = GRADIENT(p, method)
    got = ll.streamed_gradient(cut(p, 3, 17), method)
    assert_close(got.bound, want.bound, 1e-3)
    assert float(got.normaliser) == pytest.approx(float(want.normaliser), rel=1e-8)


def test_rounding_is_counted_over_all_chunks():
    """As over devices: as many parts as there are chunks, or as the longest one would make."""
    p = problems.make(5, shape=LONG)
    overview = streamed._overview(streamed._Source(cut(p, 3, 24), lambda *_: None), True)
    assert overview.longest.x_key.shape[0] == 21
    assert overview.parts == 3
    assert rounding.sum_rounding(p, 10, 2, 8, 1000) > 2 * rounding.sum_rounding(p, 10, 2, 8, 3)
    run = plan.make(as_jax(p), ll.Polynomial(2), certified=False)
    assert (run.parts, run._replace(chunks=7).parts) == (1, 7)


def test_a_promise_in_single_precision_holds_of_the_exact_gradient():
    p = problems.make(6, shape=EVEN, reach=1.0)
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), p)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), narrow)
    told = []
    got = ll.streamed_gradient(
        cut(narrow, 16),
        ll.Polynomial(4),
        progress=lambda name, tokens: told.append(name),
    )
    exact = ll.gradient(wide, ll.Exact()).gradient
    wanted = GRADIENT(wide, ll.Polynomial(4)).bound
    leaves = [jax.tree.leaves(x) for x in (got.bound, got.gradient, exact, wanted)]
    for bound, x, y, least in zip(*leaves, strict=True):
        assert bound.dtype == x.dtype == jnp.float32
        error = float(np.abs(np.asarray(x, np.float64) - y).max())
        assert error <= float(bound)
        # not by much: the same certificate, and the distance in single precision
        most = 1.1 * float(least) + 1e-4 * float(np.abs(y).max())
        assert float(least) <= float(bound) <= most
    assert told[::2] == ["mean", "centres", "keys", "queries", "keys again"] + [
        f"{name}, float64" for name in ("mean", "centres", "keys", "queries", "keys again")
    ]


def test_uncentred_tokens_and_single_precision():
    p = problems.make(6, shape=EVEN, reach=1.0)
    plain = ll.Polynomial(3, centred=False)
    assert_close(
        ll.streamed_gradient(cut(p, 16), plain, certified=False).gradient,
        UNBOUNDED(p, plain).gradient,
        1e-10,
    )
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float32) if np.ndim(x) else x, p)
    got = ll.streamed_gradient(cut(narrow, 16), ll.Polynomial(3), certified=False)
    assert {x.dtype for x in jax.tree.leaves(got.gradient)} == {jnp.dtype(jnp.float32)}
    assert_close(got.gradient, UNBOUNDED(p, ll.Polynomial(3)).gradient, 1e-4)


def test_tokens_may_lie_in_a_file(tmp_path):
    """Chunks are read from a memory map, anew in every pass."""
    p = as_jax(problems.make(7, shape=problems.Shape(lq=64, lk=64), kind="self attention"))
    path = tmp_path / "tokens.npy"
    np.save(path, np.asarray(p.x_key))
    x = np.load(path, mmap_mode="r")
    reads = []

    def chunks():
        for i in range(0, 64, 16):
            reads.append(i)
            rows = x[i : i + 16]
            yield ll.LoRAProblem(
                rows, rows, rows, np.asarray(p.target[i : i + 16]),
                weights=p.weights, adapters=p.adapters, scale=p.scale, beta=p.beta,
            )  # fmt: skip

    got = ll.streamed_gradient(chunks, ll.Polynomial(2), certified=False)
    assert_close(got.gradient, UNBOUNDED(p, ll.Polynomial(2)).gradient, 1e-10)
    assert reads == [0, 16, 32, 48] * 5


def test_what_cannot_be_streamed_is_refused_in_one_line():
    p = problems.make(5, shape=LONG)
    chunks = cut(p, 12)
    method = ll.Polynomial(2)
    refused = [
        (chunks, ll.Exact(), r"method: got Exact.*, expected a Polynomial of series 'taylor'"),
        (chunks, ll.Polynomial(2, "chebyshev"), r"method: got .*, expected a Polynomial"),
        (iter(chunks), method, r"chunks: got a list_iterator, which can be read once, expected"),
        ([], method, "chunks: got none, expected at least one LoRAProblem"),
        ([1], method, "chunks: got a int in it, expected LoRAProblems"),
        ([chunks[0], problems.make(5)], method, "chunks: got one of .*, expected widths"),
    ]
    for source, chosen, said in refused:
        with pytest.raises(ValueError, match=said):
            ll.streamed_gradient(source, chosen)
