"""The polynomial gradient against what one would pick instead, each pair in one run.

Panels of points:

grid      MultiLayer's problems (arXiv 2408.13233): exact gradients in every layout, polynomial ones of a few degrees
length    Gamma = 1 over L: exact layouts; polynomial, FAVOR+, Nystrom and the literal chain at equal k; FAVOR+ and
          Nystrom at equal time as well
long      the polynomial alone, beside one square and one skinny matrix product of the same run
rivals    HyperAttention, Thinformer and kNN attention beside the library's own, on one real head of a file
          and one tame problem
compile   compile seconds by degree

Errors are against the tiled exact gradient: in float64 up to 4096 tokens, beyond that in float32
with every product at the highest precision. Everything timed is float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from pydantic import PositiveFloat, PositiveInt

import lora_limits as ll
from experiments.contenders import baselines, race, skinny, truth
from experiments.contenders.methods import fastest
from experiments.contenders.race import Contender, Limits
from experiments.contenders.truth import Reference
from experiments.problems import minilm, real
from experiments.runner.config import Fields, Tokens
from lora_limits.gradients.cost import exact_operations, polynomial_operations
from lora_limits.instruments import timing
from lora_limits.instruments.compiling import quick_jit

VERSION = 3
POINTS = ("grid", "lengths", "exact_lengths", "long", "rivals", "compile_degrees")
PLACES = ("inputs",)


class Config(Fields):
    """grid: widths d, at L = 10 * 2^d. Exact gradients run at exact_lengths, where one takes
    max_exact_seconds or less.

    Every exact layout is tried where one takes max_tuned_seconds or less, else one block size
    alone. What asks for more than max_bytes of working memory is not run. FAVOR+ and Nystrom are
    tried with up to most_features at equal time. rivals: lengths of their problems, a power of 4.
    inputs: a file made by experiments/data/make_minilm_heads.py; the middle one of its heads is the
    real one, at lengths that it has; "" for the file of heads kept aside.
    """

    inputs: str = ""

    grid: tuple[PositiveInt, ...]
    grid_degrees: tuple[PositiveInt, ...] = (2, 3, 4)
    lengths: tuple[Tokens, ...]
    exact_lengths: tuple[Tokens, ...]
    degrees: tuple[PositiveInt, ...] = (2, 3, 4)
    long: tuple[Tokens, ...]
    long_degree: PositiveInt = 3
    rivals: tuple[Tokens, ...] = ()
    compile_degrees: tuple[PositiveInt, ...] = (2, 3, 4, 5)
    compile_length: Tokens = 4096
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gamma: PositiveFloat = 1.0
    seeds: PositiveInt = 3
    repeats: PositiveInt = 7
    max_seconds: PositiveFloat = 4.0
    max_exact_seconds: PositiveFloat = 60.0
    max_tuned_seconds: PositiveFloat = 5.0
    max_bytes: PositiveFloat = 4e9
    most_features: PositiveInt = 4096


def points(config: Config) -> list[dict[str, Any]]:
    """The four panels, one after another."""
    lengths = sorted({*config.lengths, *config.exact_lengths})
    out: list[dict[str, Any]] = [
        {"panel": "grid", "width": d, "length": 10 * 2**d} for d in config.grid
    ]
    out += [{"panel": "length", "length": n, "exact": n in config.exact_lengths} for n in lengths]
    out += [{"panel": "long", "length": n} for n in config.long]
    most = minilm.tokens(_file(config))
    for n in config.rivals:
        problems = ["tame"] if n > most else ["tame", "head"]
        out += [{"panel": "rivals", "problem": name, "length": n} for name in problems]
    return out + [{"panel": "compile", "degree": g} for g in config.compile_degrees]


def inputs(config: Config) -> dict[str, Any]:
    """The hash of the file of heads."""
    return minilm.fingerprint(_file(config))


def _file(config: Config) -> Path:
    return real.path("encoder", config.inputs, "inputs") if config.inputs else minilm.ASIDE


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Times, memory, compile times and errors of every contender by name; "best": the fastest exact
    ones.
    """
    panels = {
        "grid": _grid,
        "length": _length,
        "long": _long,
        "rivals": _rivals,
        "compile": _compile,
    }
    return panels[point["panel"]](point, config)


def _random_problems(length: int, config: Config) -> list[ll.LoRAProblem]:
    """One of each seed."""
    sizes = {"length": length, "width": config.width, "rank": config.rank, "gamma": config.gamma}
    # Compiled quickly, for a problem is made once.
    make = quick_jit(lambda key: ll.random_problem(key, **sizes))
    return [make(jax.random.key(seed)) for seed in range(config.seeds)]


def _limits(config: Config) -> Limits:
    return Limits(config.repeats, config.max_seconds, config.max_bytes, config.most_features)


def _exact(
    problems: list[ll.LoRAProblem], config: Config
) -> tuple[dict[str, Contender], list[Reference], float]:
    """(exact contenders that fit the time, references, seconds one is estimated to take)."""
    seconds = race.exact_seconds(problems[0])
    # Where one gradient takes too long there is no baseline and no truth either: a longer row has
    # the approximations alone.
    if seconds > config.max_exact_seconds:
        return {}, [], seconds
    tuned = seconds <= config.max_tuned_seconds
    contenders = race.exact_contenders(problems[0].target.shape[0], tuned=tuned)
    return contenders, [truth.reference(p) for p in problems], seconds


def _best(methods: dict[str, Any]) -> dict[str, Any]:
    """The fastest exact contender for the gradient and for the loss, and every other one's speed-up
    over it.
    """
    exact = [name for name, method in methods.items() if method["family"] == "exact"]
    best: dict[str, str] = {}
    for part in ("gradient", "loss"):
        times = _timed(methods, part)
        # Those that would not fit into memory have no time.
        if ran := [name for name in exact if name in times]:
            best[part] = fastest(times, ran)
    speed_up = {}
    for part, baseline in (("gradient", "gradient"), ("loss", "loss"), ("certified", "gradient")):
        if baseline in best:
            slow = methods[best[baseline]][baseline]
            ours = {n: t for n, t in _timed(methods, part).items() if n not in exact}
            speed_up[part] = {n: timing.ratio(slow, t)[0] for n, t in ours.items()}
    return {"best": best, "speed_up": speed_up}


def _timed(methods: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """The figures of one part by contender, of those that ran it."""
    return {name: m[part] for name, m in methods.items() if "seconds" in m.get(part, {})}


def _grid(point: dict[str, Any], config: Config) -> dict[str, Any]:
    length = point["length"]
    width = point["width"]
    sizes = {"length": length, "width": width, "rank": min(config.rank, width)}
    keys = [jax.random.key(seed) for seed in range(config.seeds)]
    problems = [baselines.multilayer_problem(key, **sizes) for key in keys]
    contenders, true, estimated = _exact(problems, config)
    ours = {f"polynomial {g}": race.polynomial(g, width) for g in config.grid_degrees}
    beside = skinny.products(length, tuple(c.features or 0 for c in ours.values()), width)
    every = contenders | ours
    methods, times = race.race(problems, every, _limits(config), true=true, beside=beside)
    found = {"methods": methods, "estimated": estimated}
    return found | _best(methods) | skinny.rates(methods, times, length, width)


def _length(point: dict[str, Any], config: Config) -> dict[str, Any]:
    length = point["length"]
    width = config.width
    problems = _random_problems(length, config)
    problem = problems[0]
    contenders = {}
    true: list[Reference] = []
    if point["exact"]:
        contenders, true, _ = _exact(problems, config)
    for g in config.degrees:
        contender = race.polynomial(g, width)
        k = contender.features or 1
        contenders |= {f"polynomial {g}": contender, f"chain {g}": race.literal_chain(g, width)}
        # Everything of one degree has as many features as its polynomial.
        contenders |= {f"favor {k}": race.favor(k, width, 0), f"nystrom {k}": race.nystrom(k)}
    limits = _limits(config)
    methods, _ = race.race(problems, contenders, limits, true=true, beside={})
    ours = {f"polynomial {g}": g for g in config.degrees}
    out = {"methods": methods, **_best(methods)}
    out["model"] = {name: polynomial_operations(problem, g) for name, g in ours.items()}
    out["model"]["exact"] = exact_operations(problem)
    if true:
        # Equal time, as the other way to be fair: each rival gets as many features as it can use
        # until it takes as long as the slowest polynomial.
        times = {name: methods[name]["gradient"]["seconds"] for name in ours}
        makers = {"favor": lambda k: race.favor(k, width, 0), "nystrom": race.nystrom}
        tried = {
            family: race.search(
                problem, make, limits, most_seconds=max(times.values()), true=true[0]
            )
            for family, make in makers.items()
        }
        out |= {"tried": tried, "equal_time": _equal_time(times, tried)}
    return out


def _equal_time(times: dict[str, float], tried: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By polynomial and family: the run with the most features among those that took no longer, or
    None.
    """
    out: dict[str, Any] = {}
    for name, seconds in times.items():
        out[name] = {}
        for family, runs in tried.items():
            fitting = [run for run in runs if run["seconds"] <= seconds]
            out[name][family] = max(fitting, key=lambda run: run["features"], default=None)
    return out


def _long(point: dict[str, Any], config: Config) -> dict[str, Any]:
    length = point["length"]
    width = config.width
    ours = race.polynomial(config.long_degree, width)
    # The loss is left out: nothing here is held against it.
    ours = ours._replace(parts={part: ours.parts[part] for part in ("gradient", "certified")})
    beside = skinny.products(length, (ours.features or 0,), width)
    contenders = {f"polynomial {config.long_degree}": ours}
    problems = _random_problems(length, config)
    methods, times = race.race(problems, contenders, _limits(config), beside=beside)
    return {"methods": methods, **skinny.rates(methods, times, length, width)}


def _rivals(point: dict[str, Any], config: Config) -> dict[str, Any]:
    length = point["length"]
    if point["problem"] == "head":
        path = _file(config)
        heads = minilm.heads(path)
        head = heads[len(heads) // 2]
        problems = [
            minilm.problem(*head, length=length, path=path, noise=1.0, seed=seed)
            for seed in range(config.seeds)
        ]
        ours: dict[str, ll.Method] = {
            "tree 128": ll.BlockTree(128, 128),
            "tree 512": ll.BlockTree(512, 512),
            "sparse 128": ll.SparseLowRank(64, 64),
        }
    else:
        problems = _random_problems(length, config)
        ours = {f"polynomial {g}": ll.Polynomial(g) for g in config.degrees}
    contenders = race.exact_contenders(length, tuned=True) | race.subquadratic_rivals(0)
    contenders |= {name: race.library(name.split()[0], m) for name, m in ours.items()}
    # losses are left out: nothing is held against them
    contenders = {
        name: c._replace(parts={"gradient": c.parts["gradient"]}) for name, c in contenders.items()
    }
    true = [truth.reference(p) for p in problems]
    methods, _ = race.race(problems, contenders, _limits(config), true=true, beside={})
    return {"methods": methods, **_best(methods)}


def _compile(point: dict[str, Any], config: Config) -> dict[str, Any]:
    degree = point["degree"]
    contenders = {f"polynomial {degree}": race.polynomial(degree, config.width)}
    problem = _random_problems(config.compile_length, config)[0]
    methods, _ = race.compile_all(problem, contenders, _limits(config))
    return {"methods": methods}
