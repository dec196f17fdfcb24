"""Factors of f on real heads: gradient error against width and against time, and what each says of
its own error.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator

import lora_limits as ll
from experiments import Refused
from experiments.contenders import decoder_factors, truth
from experiments.contenders.methods import BLOCKS, compiled, exact_methods, fastest
from experiments.contenders.sinks import Sinks
from experiments.problems import minilm, real, smollm2
from experiments.runner.config import Fields
from lora_limits.instruments import timing
from lora_limits.instruments.compiling import quick_jit

VERSION = 3
POINTS = ("lengths", "most", "methods", "timed", "decoder_lengths", "decoder_most", "decoder_timed")
PLACES = ("inputs", "decoder")
NEAR = 4  # near keys of a block tree, and samples, to each column of its width
MAKERS: dict[str, Any] = {
    "svd": ll.Svd,
    "tree": lambda k: ll.BlockTree(NEAR * k, NEAR * k),
    "skeleton": ll.Skeleton,
    "sparse": lambda k: ll.SparseLowRank(max(k // 2, 1), max(k // 2, 1)),
    "monomials": ll.AdaptedMonomials,
    "random": ll.RandomFeatures,
    "nystrom": ll.Nystrom,
}
METHODS = tuple(MAKERS)
# On a decoder's heads: the methods that know what is causal and turned, and one that is its own.
DECODER_MAKERS: dict[str, Any] = {"sinks": Sinks, **MAKERS}
TRUTHS: dict[tuple[Any, ...], Any] = {}
DENSE = 2048  # the longest sequence whose singular value decomposition is computed


class Config(Fields):
    """Widths of the factors on `most` heads of each layer at `lengths` tokens; times at `timed`
    tokens.

    noise: of the target, beside the head's output: errors are relative to the gradient, which grows
    with it. inputs: a file of longer inputs made by experiments/data/make_minilm_heads.py; "" for
    the 512 tokens embedded. Times need no text: they are taken on a head whose tokens are repeated
    with noise. sparse: half of its width is entries. tree: four near keys and four samples to each
    column of width. decoder: a file made by experiments/data/make_smollm2_heads.py, "" for the heads
    embedded, of which `decoder_most` of each layer are taken at decoder_lengths; its heads have what
    the loss says of them as residual, of the size that noise has, and are timed on their own text.
    """

    inputs: str = ""
    decoder: str = ""
    decoder_lengths: tuple[PositiveInt, ...] = (512, 2048)
    decoder_most: NonNegativeInt = 4
    decoder_timed: tuple[PositiveInt, ...] = (2048,)
    noise: PositiveFloat = 1.0
    lengths: tuple[PositiveInt, ...] = (512,)
    most: PositiveInt = 3
    widths: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256)
    methods: tuple[str, ...] = METHODS
    timed: tuple[PositiveInt, ...] = (2048, 4096, 8192)
    timed_widths: tuple[PositiveInt, ...] = (64, 256)
    rank: PositiveInt = 4
    seed: int = 0
    repeats: PositiveInt = 3
    max_seconds: PositiveFloat = 6.0

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(value) - set(METHODS)):
            raise ValueError(f"got {unknown}, expected names among {list(METHODS)}")
        return value


def points(config: Config) -> list[dict[str, Any]]:
    """Errors of one method on one head at one length; then times at one length."""
    chosen = real.spread(_path(config), config.most)
    most = minilm.tokens(_path(config))
    if max(config.lengths, default=1) > most:
        longer = "--inputs FILE names longer ones, see experiments/data/README.md"
        got = f"got {max(config.lengths)}, expected at most {most}, the tokens there are"
        raise Refused(f"lengths: {got}; {longer}")
    # Method before head: a program is compiled once for all heads.
    out: list[dict[str, Any]] = [
        {"kind": "error", "method": method, "layer": layer, "head": head, "length": length}
        for length in config.lengths
        for method in config.methods
        # The decomposition costs O(L^3).
        if method != "svd" or length <= DENSE
        for layer, head in chosen
    ]
    out += [{"kind": "time", "length": length} for length in config.timed]
    return out + _decoder_points(config)


def _decoder_points(config: Config) -> list[dict[str, Any]]:
    """The same of the decoder; a point names its file by a hash, as the encoder's rows do not have it."""
    path = real.path("decoder", config.decoder, "decoder")
    real.check_lengths("decoder_lengths", config.decoder_lengths, path)
    real.check_lengths("decoder_timed", config.decoder_timed, path)
    file = minilm.fingerprint(path)["heads"]
    wanted = {"sinks", *config.methods}
    out: list[dict[str, Any]] = [
        {
            "kind": "decoder",
            "method": method,
            "layer": layer,
            "head": head,
            "length": n,
            "file": file,
        }
        for n in config.decoder_lengths
        for method in decoder_factors.able(DECODER_MAKERS)
        if method in wanted and (method != "svd" or n <= DENSE)
        for layer, head in real.spread(path, config.decoder_most)
    ]
    timed = config.decoder_timed if config.decoder_most else ()
    return out + [{"kind": "decoder time", "length": n, "file": file} for n in timed]


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the file of heads."""
    return minilm.fingerprint(_path(config))


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """By width: relative Frobenius errors by array, their estimates, failure; or times and errors
    at one length.
    """
    return MEASURES[point["kind"]](point, config)


def _path(config: Config) -> Path:
    return real.path("encoder", config.inputs, "inputs")


def make(name: str, width: int) -> ll.Method:
    """The method of that name and width."""
    return MAKERS[name](width)


@functools.cache
def _quick(name: str, width: int) -> Any:
    """problem -> (gradient, its estimated error, whether the method says it failed)."""
    method = make(name, width)

    def run(problem):
        result = ll.gradient(problem, method)
        return result.gradient, result.relative_error, result.failed

    return quick_jit(run)


@functools.cache
def _exact() -> Any:
    return quick_jit(lambda problem: ll.gradient(problem, ll.Exact(min(BLOCKS))).gradient)


def _truth(config: Config, layer: int, head: int, length: int) -> Any:
    """The exact gradient of a head, computed once for all methods."""
    place = (config.inputs, config.noise, config.rank, config.seed, layer, head, length)
    if place not in TRUTHS:
        TRUTHS[place] = truth.of_gradient(_exact()(_problem(config, layer, head, length)))
    return TRUTHS[place]


def _problem(config: Config, layer: int, head: int, length: int) -> ll.LoRAProblem:
    own = {"rank": config.rank, "seed": config.seed, "noise": config.noise}
    return minilm.problem(layer, head, length=length, path=_path(config), **own)


def _errors(point: dict[str, Any], config: Config) -> dict[str, Any]:
    place = point["layer"], point["head"]
    path = _path(config)
    problem = _problem(config, *place, point["length"])
    true = _truth(config, *place, point["length"])
    widths = []
    for width in config.widths:
        gradient, estimated, failed = _quick(point["method"], width)(problem)
        found = truth.errors(gradient, true)
        # The method's own estimate is one number an array; a user would go by the worst.
        said = max(float(x) for x in truth.named(estimated).values())
        widths.append({"width": width, **found, "estimated": said, "failed": bool(failed)})
    return {"score_range": minilm.score_range(*place, path=path), "widths": widths}


def stretched(problem: ll.LoRAProblem, length: int, seed: int = 0) -> ll.LoRAProblem:
    """The problem with its tokens repeated up to `length`, with noise of a twentieth of the spread
    of each column.
    """
    random = np.random.default_rng(seed)

    def longer(x):
        x = np.asarray(x)
        out = np.resize(x, (length, x.shape[1]))
        noise = random.standard_normal(out.shape).astype(x.dtype)
        return jnp.asarray(out + 0.05 * x.std(0) * noise, x.dtype)

    x = longer(problem.x_query)
    target = longer(problem.target)
    return dataclasses.replace(problem, x_query=x, x_key=x, x_value=x, target=target)


def _times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    own = {"rank": config.rank, "seed": config.seed, "noise": config.noise}
    # A head of the middle: neither tame nor wild.
    head = minilm.problem(*minilm.heads()[11], **own)
    problem = stretched(head, point["length"])
    exact = exact_methods(point["length"])
    methods: dict[str, ll.Method] = dict(exact)
    for name in ("skeleton", "sparse", "tree"):
        methods |= {f"{name} {k}": make(name, k) for k in config.timed_widths}
    out: dict[str, dict[str, Any]] = {}
    programs = {}
    for name, method in methods.items():
        out[name], programs[name] = compiled(problem, method)
    calls = {name: functools.partial(program, problem) for name, program in programs.items()}
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    best = fastest(times, exact)
    # The fastest exact gradient is the truth too; it has been compiled and run.
    true = truth.of_gradient(programs[best](problem))
    for name in out:
        out[name] |= times[name]
        if name not in exact:
            out[name] |= truth.errors(programs[name](problem), true)
    return {"best": best, "contenders": out}


def _decoder_errors(point: dict[str, Any], config: Config) -> dict[str, Any]:
    place, length = (point["layer"], point["head"]), point["length"]
    path = real.path("decoder", config.decoder, "decoder")
    own = {"rank": config.rank, "seed": config.seed, "size": config.noise}
    problem = smollm2.problem(*place, length=length, path=path, **own)
    key = (point["file"], config.noise, config.rank, config.seed, *place, length)
    if key not in TRUTHS:
        TRUTHS[key] = decoder_factors.true_gradient(problem)
    make = DECODER_MAKERS[point["method"]]
    found = decoder_factors.errors(problem, TRUTHS[key], make, config.widths)
    return {"score_range": smollm2.score_range(*place, path=path), "widths": found}


def _decoder_times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    path = real.path("decoder", config.decoder, "decoder")
    # A head of the middle: neither tame nor wild.
    every = smollm2.heads(path)
    own = {"rank": config.rank, "seed": config.seed, "size": config.noise}
    problem = smollm2.problem(*every[len(every) // 2], length=point["length"], path=path, **own)
    methods = {
        f"{name} {k}": DECODER_MAKERS[name](k)
        for name in decoder_factors.able(DECODER_MAKERS)
        if name in ("sinks", "skeleton", "sparse", "tree")
        for k in config.timed_widths
    }
    how = {"repeats": config.repeats, "max_seconds": config.max_seconds}
    return decoder_factors.times(problem, methods, **how)


MEASURES = {
    "error": _errors,
    "time": _times,
    "decoder": _decoder_errors,
    "decoder time": _decoder_times,
}
