"""The polynomial gradient of tokens that are not in memory: chunk by chunk, whatever the length.

All that a query reads of the keys are k (1 + d_value + r) sums (sweeps.py), so tokens may lie on a
disk and pass by in chunks. Five passes: the mean of the queries; the centres of the keys, and a
sample of tokens to balance by; the sums over keys; the queries; and the keys once more, for the
adapters that live on them. Each is the sweep that `gradient` makes, over one chunk at a time, and
what it leaves is added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.checks import fail
from lora_limits.coordinates import blocks, sampling
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.sampling import Sample
from lora_limits.gradients import key_summary, plan, sweeps
from lora_limits.gradients.methods import Polynomial, in_inputs
from lora_limits.gradients.plan import Plan
from lora_limits.method import GradientResult
from lora_limits.polynomial import monomials, series
from lora_limits.problem import LoRAProblem, as_jax, check_static
from lora_limits.problem_checks import refuse_structure

Chunks = Iterable[LoRAProblem] | Callable[[], Iterable[LoRAProblem]]
TOKENS = {"x_query": "queries", "target": "queries", "x_key": "keys", "x_value": "keys"}


def streamed_gradient(
    chunks: Chunks,
    method: Polynomial,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> GradientResult:
    """`gradient` of one sequence that comes in chunks, the same to rounding, with no bound.

    chunks: LoRAProblems that hold consecutive tokens and are alike in all else: a list, an object
    that can be iterated over anew, or a function that returns an iterator, which is called for each
    pass. Chunks of one length are one program. Tokens may be np.memmap's: nothing but a chunk is
    read at a time. progress: called as progress(pass, tokens so far) after every chunk.
    O(L k (1 + d_value + r)) time in 4 or 5 passes, memory of one chunk and O(k (1 + d_value + r)).
    Taylor's series alone: the others ask for the range of all scores first. loss and gradient are
    set, and `rank`; what is said of the error needs exact rows or the whole sequence.
    Raises ValueError for other methods, for a source that is empty or can be read only once, and
    for chunks that do not fit together.
    """
    if not isinstance(method, Polynomial) or method.series != "taylor":
        fail("method", repr(method), "a Polynomial of series 'taylor'")
    source = _Source(chunks, progress or (lambda name, tokens: None))
    first, q_shift, lengths = _query_mean(source, method.centred)
    frame, sample = _frame(source, first, q_shift, lengths, method.centred)
    each = functools.partial(_part, frame=frame, sample=sample, method=method)

    m = functools.reduce(jnp.add, (each(_keys, chunk) for chunk in source.read("keys")))
    c = monomials.coefficients(series.taylor(method.degree, first.dtype), frame.nu.shape[0])
    seen = (each(_queries, chunk, m * c) for chunk in source.read("queries"))
    seen = functools.reduce(_added, seen)
    late: dict[str, Any] = {}
    if seen.back is not None:
        parts = (each(_keys_again, chunk, seen.back * c) for chunk in source.read("keys again"))
        late = functools.reduce(_added, parts)
    run = _plan(first, frame, sample, method)
    return GradientResult(in_inputs(run, seen, late), seen.loss, rank=run.features)


class _Source:
    """Chunks that can be read again, each checked, with a word to whoever waits."""

    def __init__(self, chunks: Chunks, progress: Callable[[str, int], None]):
        if isinstance(chunks, Iterator):
            expected = "a list, or a function that returns it: it is read several times"
            fail("chunks", f"a {type(chunks).__name__}, which can be read once", expected)
        self._chunks = chunks
        self._progress = progress
        self._shapes: Any = None

    def read(self, name: str) -> Iterator[LoRAProblem]:
        tokens = 0
        for chunk in self._chunks() if callable(self._chunks) else self._chunks:
            if not isinstance(chunk, LoRAProblem):
                fail("chunks", f"a {type(chunk).__name__} in it", "LoRAProblems")
            check_static(chunk)
            refuse_structure(chunk, "streamed_gradient")
            shapes = _shapes(chunk)
            if self._shapes not in (None, shapes):
                fail("chunks", f"one of {shapes}", f"widths and ranks as before, {self._shapes}")
            self._shapes = shapes
            yield as_jax(chunk)
            tokens += max(chunk.x_query.shape[0], chunk.x_key.shape[0])
            self._progress(name, tokens)
        if tokens == 0:
            fail("chunks", "none", "at least one LoRAProblem")


def _shapes(chunk: LoRAProblem) -> tuple:
    """Shapes of all arrays, of those over tokens the widths alone."""
    found = jax.tree_util.tree_leaves_with_path(chunk)
    return tuple(
        np.shape(x)[1:] if path[0].name in TOKENS else np.shape(x)  # pyright: ignore
        for path, x in found
    )


def _added(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _query_mean(source: _Source, centred: bool) -> tuple[LoRAProblem, jax.Array, dict[str, int]]:
    """First pass: the first chunk, the mean of the query inputs, and how many queries and keys."""
    first = None
    total = jnp.zeros(())
    lengths = {"queries": 0, "keys": 0}
    for chunk in source.read("mean"):
        here = jnp.asarray(chunk.x_query, chunk.dtype).sum(0)
        total = here if first is None else total + here
        first = chunk if first is None else first
        lengths["queries"] += chunk.x_query.shape[0]
        lengths["keys"] += chunk.x_key.shape[0]
    assert first is not None
    return first, total / lengths["queries"] if centred else 0 * total, lengths


def _frame(
    source: _Source, first: LoRAProblem, q_shift: jax.Array, lengths: dict[str, int], centred: bool
) -> tuple[Frame, Sample]:
    """Second pass: the frame of all tokens, balanced by the sample that `gradient` would take."""
    index = {name: sampling.evenly(length) for name, length in lengths.items()}
    picked: dict[str, list[Any]] = {name: [] for name in TOKENS}
    before = {"queries": 0, "keys": 0}
    statistics = None
    for chunk in source.read("centres"):
        found = _statistics(chunk, q_shift)
        statistics = found if statistics is None else statistics.joined(found)
        for name, side in TOKENS.items():
            x = getattr(chunk, name)
            inside = index[side] - before[side]
            inside = inside[(inside >= 0) & (inside < x.shape[0])]
            picked[name].append(np.asarray(x)[inside])
        before["queries"] += chunk.x_query.shape[0]
        before["keys"] += chunk.x_key.shape[0]
    assert statistics is not None
    frame = frames.centre(first, q_shift, statistics, centred)

    def sampled(path, leaf):
        name = path[0].name
        return jnp.asarray(np.concatenate(picked[name])) if name in picked else leaf

    return frames.balanced(jax.tree_util.tree_map_with_path(sampled, first), frame)


@jax.jit
def _statistics(chunk: LoRAProblem, q_shift: jax.Array) -> frames.KeyStatistics:
    return frames.key_statistics(chunk, q_shift, frames.BLOCK)


def _plan(chunk: LoRAProblem, frame: Frame, sample: Sample, method: Polynomial) -> Plan:
    """The plan of `gradient`, nothing certified, for one chunk in the frame of all."""
    block = method.block_size or plan.block_size(chunk, method.degree)
    return Plan(chunk, method, frame, sample, blocks.maps(chunk, frame), None, block, None)


@functools.partial(jax.jit, static_argnames=("work", "method"))
def _part(work, chunk, *args, frame: Frame, sample: Sample, method: Polynomial):
    """work(plan of the chunk, ...), one program for each length of chunk."""
    return work(_plan(chunk, frame, sample, method), *args)


def _keys(run: Plan) -> jax.Array:
    return key_summary.summarise(run).m


def _queries(run: Plan, m: jax.Array) -> sweeps.Seen:
    return sweeps.visit_queries(run, None, m)


def _keys_again(run: Plan, back: jax.Array) -> dict[str, Any]:
    return sweeps.visit_keys(run, back)
