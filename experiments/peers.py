"""The polynomial gradient against what one would pick instead, each pair in one run.

Panels of points:

grid      MultiLayer's problems (arXiv 2408.13233): exact gradients in every layout, polynomial ones of a few degrees
length    Gamma = 1 over L: exact layouts; polynomial, FAVOR+, Nystrom and the literal chain at equal k; FAVOR+ and
          Nystrom at equal time as well
long      the polynomial alone, beside one square and one skinny matrix product of the same run
compile   compile seconds by degree

Errors are against the tiled exact gradient: in float64 up to 4096 tokens, beyond that in float32
with every product at the highest precision. Everything timed is float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from experiments.runner.config import Fields

if TYPE_CHECKING:
    import lora_limits as ll
    from experiments.contenders.race import Contender, Limits
    from experiments.contenders.truth import Reference

VERSION = 1
SHARED = (
    "grid_degrees",
    "degrees",
    "width",
    "rank",
    "gamma",
    "long_degree",
    "compile_length",
    "seed",
    "repeats",
    "max_seconds",
    "max_exact_seconds",
    "max_tuned_seconds",
    "max_bytes",
    "most_features",
)
SQUARE = 2048
SKINNY_LENGTH = 2**18  # beyond it the rate no longer changes, and the features alone take gigabytes


class Config(Fields):
    """grid: widths d, at L = 10 * 2^d. Exact gradients run at exact_lengths, where one takes
    max_exact_seconds or less.

    Every exact layout is tried where one takes max_tuned_seconds or less, else one block size
    alone. What asks for more than max_bytes of working memory is not run. FAVOR+ and Nystrom are
    tried with up to most_features at equal time.
    """

    grid: tuple[PositiveInt, ...]
    grid_degrees: tuple[PositiveInt, ...] = (2, 3, 4)
    lengths: tuple[PositiveInt, ...]
    exact_lengths: tuple[PositiveInt, ...]
    degrees: tuple[PositiveInt, ...] = (2, 3)
    long: tuple[PositiveInt, ...]
    long_degree: PositiveInt = 3
    compile_degrees: tuple[PositiveInt, ...] = (2, 3, 4, 5)
    compile_length: PositiveInt = 4096
    width: PositiveInt = 8
    rank: PositiveInt = 4
    gamma: PositiveFloat = 1.0
    seed: int = 0
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
    return out + [{"panel": "compile", "degree": g} for g in config.compile_degrees]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Times, memory, compile times and errors of every contender by name; "best": the fastest exact
    ones.
    """
    panels = {"grid": _grid, "length": _length, "long": _long, "compile": _compile}
    return panels[point["panel"]](point, config)


def _random_problem(length: int, config: Config) -> ll.LoRAProblem:
    import jax

    import lora_limits as ll
    from lora_limits.instruments.compiling import quick_jit

    sizes = {"length": length, "width": config.width, "rank": config.rank, "gamma": config.gamma}
    return quick_jit(lambda key: ll.random_problem(key, **sizes))(jax.random.key(config.seed))


def _limits(config: Config) -> Limits:
    from experiments.contenders.race import Limits

    return Limits(config.repeats, config.max_seconds, config.max_bytes, config.most_features)


def _exact(
    problem: ll.LoRAProblem, config: Config
) -> tuple[dict[str, Contender], Reference | None, float]:
    """(exact contenders that fit the time, reference, seconds one is estimated to take)."""
    from experiments.contenders import race, truth

    seconds = race.exact_seconds(problem)
    if seconds > config.max_exact_seconds:
        return {}, None, seconds
    tuned = seconds <= config.max_tuned_seconds
    return (
        race.exact_contenders(problem.target.shape[0], tuned=tuned),
        truth.reference(problem),
        seconds,
    )


def _products(length: int, features: tuple[int, ...], width: int) -> dict[str, Any]:
    """Calls of a square product and, by k, of (k x L) (L x (d + 1)), the product the polynomial
    gradient lives on.
    """
    import jax
    import jax.numpy as jnp

    from lora_limits.linalg import dot

    product = jax.jit(dot)
    square = jnp.ones((SQUARE, SQUARE))
    calls: dict[str, Any] = {"square": lambda: product(square, square)}
    for k in features:
        left = jnp.ones((k, min(length, SKINNY_LENGTH)))
        right = jnp.ones((min(length, SKINNY_LENGTH), width + 1))
        calls[f"skinny {k}"] = lambda x=left, y=right: product(x, y)
    return calls


def _rates(
    methods: dict[str, Any], beside: dict[str, float], length: int, width: int
) -> dict[str, Any]:
    """Ratios to the square product, and the share of the skinny rate that 3 products of L k (d + 1)
    terms come to.

    Three are what a query adapter cannot do without; a value adapter needs more, which is not
    counted.
    """
    out: dict[str, Any] = {
        "square_seconds": beside["square"],
        "skinny_rate": {},
        "attained": {},
        "to_square": {},
    }
    for name, method in methods.items():
        k = method["features"]
        if f"skinny {k}" not in beside or method["family"] != "polynomial":
            continue
        products = 2.0 * k * (width + 1)
        rate = products * min(length, SKINNY_LENGTH) / beside[f"skinny {k}"]
        out["skinny_rate"][name] = rate
        if "seconds" in method["gradient"]:
            seconds = method["gradient"]["seconds"]
            out["attained"][name] = 3 * products * length / seconds / rate
            out["to_square"][name] = seconds / beside["square"]
    return out


def _best(methods: dict[str, Any]) -> dict[str, Any]:
    """The fastest exact contender for the gradient and for the loss, and every other one's speed-up
    over it.
    """
    best = {}
    speed_up = {}
    for part, baseline in (("gradient", "gradient"), ("loss", "loss"), ("certified", "gradient")):
        times = {n: m[part]["seconds"] for n, m in methods.items() if "seconds" in m.get(part, {})}
        if part != "certified":
            exact = [n for n in times if methods[n]["family"] == "exact"]
            if exact:
                best[part] = min(exact, key=lambda n: times[n])
        if baseline in best:
            least = methods[best[baseline]][baseline]["seconds"]
            speed_up[part] = {
                n: least / t for n, t in times.items() if methods[n]["family"] != "exact"
            }
    return {"best": best, "speed_up": speed_up}


def _grid(point: dict[str, Any], config: Config) -> dict[str, Any]:
    import jax

    from experiments.contenders import baselines, race

    length = point["length"]
    width = point["width"]
    key = jax.random.key(config.seed)
    problem = baselines.multilayer_problem(
        key, length=length, width=width, rank=min(config.rank, width)
    )
    contenders, true, estimated = _exact(problem, config)
    ours = {f"polynomial {g}": race.polynomial(g, width) for g in config.grid_degrees}
    beside = _products(length, tuple(c.features or 0 for c in ours.values()), width)
    methods, seconds = race.race(
        problem, contenders | ours, _limits(config), true=true, beside=beside
    )
    return {
        "methods": methods,
        "estimated": estimated,
        **_best(methods),
        **_rates(methods, seconds, length, width),
    }


def _length(point: dict[str, Any], config: Config) -> dict[str, Any]:
    from experiments.contenders import race
    from lora_limits.gradients.cost import exact_operations, polynomial_operations

    length = point["length"]
    width = config.width
    seed = config.seed
    problem = _random_problem(length, config)
    contenders = {}
    true = None
    if point["exact"]:
        contenders, true, _ = _exact(problem, config)
    for g in config.degrees:
        ours = race.polynomial(g, width)
        k = ours.features or 1
        contenders |= {f"polynomial {g}": ours, f"chain {g}": race.literal_chain(g, width)}
        contenders |= {f"favor {k}": race.favor(k, width, seed), f"nystrom {k}": race.nystrom(k)}
    limits = _limits(config)
    methods, _ = race.race(problem, contenders, limits, true=true, beside={})
    names = [f"polynomial {g}" for g in config.degrees]
    out = {"methods": methods, **_best(methods)}
    out["model"] = {f"polynomial {g}": polynomial_operations(problem, g) for g in config.degrees}
    out["model"]["exact"] = exact_operations(problem)
    if true is not None:
        times = {name: methods[name]["gradient"]["seconds"] for name in names}
        makers = {"favor": lambda k: race.favor(k, width, seed), "nystrom": race.nystrom}
        tried = {
            family: race.search(problem, make, limits, most_seconds=max(times.values()), true=true)
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
        fits = {
            family: [run for run in runs if run["seconds"] <= seconds]
            for family, runs in tried.items()
        }
        out[name] = {
            family: max(runs, key=lambda r: r["features"], default=None)
            for family, runs in fits.items()
        }
    return out


def _long(point: dict[str, Any], config: Config) -> dict[str, Any]:
    from experiments.contenders import race

    length = point["length"]
    width = config.width
    ours = race.polynomial(config.long_degree, width)
    ours = ours._replace(parts={part: ours.parts[part] for part in ("gradient", "certified")})
    beside = _products(length, (ours.features or 0,), width)
    contenders = {f"polynomial {config.long_degree}": ours}
    problem = _random_problem(length, config)
    methods, seconds = race.race(problem, contenders, _limits(config), true=None, beside=beside)
    return {"methods": methods, **_rates(methods, seconds, length, width)}


def _compile(point: dict[str, Any], config: Config) -> dict[str, Any]:
    from experiments.contenders import race

    contenders = {f"polynomial {point['degree']}": race.polynomial(point["degree"], config.width)}
    methods, _ = race.compile_all(
        _random_problem(config.compile_length, config), contenders, _limits(config)
    )
    return {"methods": methods}
