"""The polynomial gradient of tokens that are not in memory: chunk by chunk, whatever the length.

All that a query reads of the keys are k (1 + d_value + r) sums (sweeps.py), so tokens may lie on a
disk and pass by in chunks. Five passes: the mean of the queries; the centres of the keys, and a
sample of tokens to balance by; the sums over keys; the queries; and the keys once more, for the
adapters that live on them. Each is the sweep that `gradient` makes, over one chunk at a time, and
what it leaves is added up, as what devices leave is in sharded.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.certificate import bound, columns
from lora_limits.certificate.columns import Columns
from lora_limits.certificate.terms import Grounds
from lora_limits.checks import fail
from lora_limits.coordinates import blocks, key_statistics, sampling
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.frame import Frame
from lora_limits.coordinates.key_statistics import KeyStatistics
from lora_limits.coordinates.sampling import Sample
from lora_limits.gradients import fitting, key_summary, methods, plan, sweeps
from lora_limits.gradients.methods import Polynomial
from lora_limits.gradients.plan import Plan
from lora_limits.method import GradientResult
from lora_limits.polynomial import monomials
from lora_limits.problem import LoRAProblem, as_jax, check_static
from lora_limits.problem_checks import refuse_structure

Chunks = Iterable[LoRAProblem] | Callable[[], Iterable[LoRAProblem]]
TOKENS = {"x_query": "queries", "target": "queries", "x_key": "keys", "x_value": "keys"}


def streamed_gradient(
    chunks: Chunks,
    method: Polynomial,
    *,
    certified: bool = True,
    progress: Callable[[str, int], None] | None = None,
) -> GradientResult:
    """`gradient` of one sequence that comes in chunks, the same to rounding, its bound included.

    chunks: LoRAProblems that hold consecutive tokens and are alike in all else: a list, an object
    that can be iterated over anew, or a function that returns an iterator, which is called for each
    pass. Chunks of one length are one program. Tokens may be np.memmap's: nothing but a chunk is
    read at a time, and the longest one is kept. certified: False leaves out the bound and the
    normaliser, and with them a quarter of the time in float64, more than half in float32, whose
    passes are made once more in float64. progress: called as progress(pass, tokens so far) after
    every chunk.
    O(L k (1 + d_value + r)) time in 4 or 5 passes, memory of two chunks and
    O(k (1 + d_value + r)). Taylor's series alone: the others ask for the range of all scores first.
    loss, gradient, rank, bound and normaliser are set; a sampled promise needs the whole sequence.
    Raises ValueError for other methods, for a source that is empty or can be read only once, and
    for chunks that do not fit together.
    """
    if not isinstance(method, Polynomial) or method.series != "taylor":
        fail("method", repr(method), "a Polynomial of series 'taylor'")
    source = _Source(chunks, progress or (lambda name, tokens: None))
    found = _solve(source, method, certified=certified)
    dtype = found.loss.dtype
    if not certified or found.bound is not None:
        return found
    # as `gradient` does in less than double precision: the same numbers certified in double
    source.wide = True
    with jax.enable_x64(True):
        wide = _solve(source, method, certified=True)
        assert wide.bound is not None
        assert wide.normaliser is not None
        told = bound.with_distance(wide.bound, found.gradient, wide.gradient)
        return dataclasses.replace(found, bound=told, normaliser=wide.normaliser.astype(dtype))


def _solve(source: _Source, method: Polynomial, *, certified: bool) -> GradientResult:
    """The passes over the source, in the precision of its chunks; 64 bits can be certified alone."""
    overview = _overview(source, method.centred)
    longest, parts = overview.longest, overview.parts
    frame, sample = _frame(source, overview, method.centred)
    certified = certified and jnp.finfo(longest.dtype).bits == 64
    scales = columns.make(longest, sample) if certified else None
    shared = _Shared(frame, sample, scales)

    def each(name: str, work: Callable[..., Any], *args: Any) -> Iterator[Any]:
        for chunk in source.read(name):
            yield _part(work, shared, chunk, *args, method=method, parts=parts)

    run = _plan(shared, longest, method, parts)
    keys = functools.reduce(key_summary.Part.joined, each("keys", key_summary.visit))
    summary = key_summary.summary(run, keys)
    setup = fitting.setup(run, summary.moments)
    grounds = methods.grounds_of(run, summary, setup)
    c = monomials.coefficients(setup.c, run.width)
    # each chunk puts its own tokens in
    stands_on = None if grounds is None else grounds._replace(problem=None)
    seen = functools.reduce(sweeps.joined, each("queries", _queries, summary.m * c, stands_on))
    late: dict[str, Any] = {}
    if seen.back is not None:
        late = functools.reduce(_added, each("keys again", sweeps.visit_keys, seen.back * c))
    gradient = methods.in_inputs(run, seen, late)
    result = GradientResult(gradient, seen.loss, rank=run.features)
    if grounds is None or seen.sums is None:
        return result
    told = bound.bounds_of(bound.finish(grounds, seen.sums, gradient, run.parts))
    return dataclasses.replace(result, bound=told, normaliser=seen.sums.certain)


class _Source:
    """Chunks that can be read again, each checked, with a word to whoever waits."""

    def __init__(self, chunks: Chunks, progress: Callable[[str, int], None]):
        if isinstance(chunks, Iterator):
            expected = "a list, or a function that returns it: it is read several times"
            fail("chunks", f"a {type(chunks).__name__}, which can be read once", expected)
        self._chunks = chunks
        self._progress = progress
        self._shapes: Any = None
        # tokens are the same numbers in every pass, whatever precision it is made in
        self._x64 = jax.config.read("jax_enable_x64")
        self.wide = False

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
            with jax.enable_x64(self._x64):
                chunk = as_jax(chunk)
            yield methods.widened_problem(chunk) if self.wide else chunk
            tokens += max(chunk.x_query.shape[0], chunk.x_key.shape[0])
            self._progress(f"{name}, float64" if self.wide else name, tokens)
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


class _Overview(NamedTuple):
    """What the first pass tells."""

    longest: LoRAProblem  # the chunk of most tokens
    q_shift: jax.Array  # the mean of the query inputs
    lengths: dict[str, int]  # how many queries and keys there are
    chunks: int  # how many

    @property
    def parts(self) -> int:
        """As many as there are chunks, or as chunks of the longest one's size would be."""
        size = _tokens(self.longest)
        return max(self.chunks, -(-sum(self.lengths.values()) // size))


def _tokens(chunk: LoRAProblem) -> int:
    return chunk.x_query.shape[0] + chunk.x_key.shape[0]


def _overview(source: _Source, centred: bool) -> _Overview:
    """First pass."""
    longest = None
    total = jnp.zeros(())
    lengths = {"queries": 0, "keys": 0}
    count = 0
    for chunk in source.read("mean"):
        here = jnp.asarray(chunk.x_query, chunk.dtype).sum(0)
        total = here if longest is None else total + here
        if longest is None or _tokens(chunk) > _tokens(longest):
            longest = chunk
        lengths["queries"] += chunk.x_query.shape[0]
        lengths["keys"] += chunk.x_key.shape[0]
        count += 1
    assert longest is not None
    return _Overview(longest, total / lengths["queries"] if centred else 0 * total, lengths, count)


def _frame(source: _Source, overview: _Overview, centred: bool) -> tuple[Frame, Sample]:
    """Second pass: the frame of all tokens, balanced by the sample that `gradient` would take."""
    index = {name: sampling.evenly(length) for name, length in overview.lengths.items()}
    picked: dict[str, list[Any]] = {name: [] for name in TOKENS}
    before = {"queries": 0, "keys": 0}
    statistics = None
    for chunk in source.read("centres"):
        found = _statistics(chunk, overview.q_shift)
        statistics = found if statistics is None else statistics.joined(found)
        for name, side in TOKENS.items():
            x = getattr(chunk, name)
            inside = index[side] - before[side]
            inside = inside[(inside >= 0) & (inside < x.shape[0])]
            picked[name].append(np.asarray(x)[inside])
        before["queries"] += chunk.x_query.shape[0]
        before["keys"] += chunk.x_key.shape[0]
    assert statistics is not None
    frame = frames.centre(overview.longest, overview.q_shift, statistics, centred)

    def sampled(path, leaf):
        name = path[0].name
        return jnp.asarray(np.concatenate(picked[name])) if name in picked else leaf

    return frames.balanced(jax.tree_util.tree_map_with_path(sampled, overview.longest), frame)


@jax.jit
def _statistics(chunk: LoRAProblem, q_shift: jax.Array) -> KeyStatistics:
    return key_statistics.of_problem(chunk, q_shift, frames.BLOCK)


class _Shared(NamedTuple):
    """What the sweeps over every chunk share: the plan of the whole sequence, but for its tokens."""

    frame: Frame
    sample: Sample
    columns: Columns | None


@functools.partial(jax.jit, static_argnames=("work", "method", "parts"))
def _part(work, shared: _Shared, chunk, *args, method: Polynomial, parts: int):
    """work(plan of the chunk, ...), one program for each length of chunk."""
    return work(_plan(shared, chunk, method, parts), *args)


def _plan(shared: _Shared, chunk: LoRAProblem, method: Polynomial, parts: int) -> Plan:
    frame, sample, scales = shared
    block = method.block_size or plan.block_size(chunk, method.degree)
    table = blocks.maps(chunk, frame)
    return Plan(chunk, method, frame, sample, table, scales, block, None, chunks=parts)


def _queries(run: Plan, m: jax.Array, grounds: Grounds | None) -> sweeps.Seen:
    if grounds is not None:
        grounds = grounds._replace(problem=run.problem)
    return sweeps.visit_queries(run, grounds, m)
