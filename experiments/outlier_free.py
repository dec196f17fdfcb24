"""Table 1 put to its theory: LoRA on attention of OPT's shapes, softmax against the outlier-free
softmax_1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from experiments.runner.config import Fields

VERSION = 2
SHARED = (
    *(
        "ranks",
        "layers",
        "length",
        "pretraining",
        "tuning",
        "ladder",
        "families",
        "heads",
        "sequences",
    ),
    *("timed", "stretch", "repeats", "max_seconds", "seed"),
)
BASES = Path("results/bases")
SHAPES = {"125M": (768, 12), "350M": (1024, 16), "1.3B": (2048, 32)}
WIDTH = 64
SCALE = 2.0  # alpha / r of Table 1: 256 / 128
BLOCKS = (512, 1024)
Model = Literal["125M", "350M", "1.3B"]
Family = Literal["svd", "skeleton", "sparse", "polynomial"]
Attention = Literal["softmax", "softmax_1"]


class Config(Fields):
    """Causal decoders with OPT's d_model and heads of width 64, full LoRA, float32; one sequence a
    step.

    Bases are pretrained here on prose, their MLP no wider than d_model, and their adapters tuned on
    code. ladder: widths of the factors tried. timed: tokens of what is timed, with OPT's own MLP (4
    d_model). stretch: of W*_Q and W*_K, for a step with other norms. heads, sequences: measured of
    each layer.
    """

    models: tuple[Model, ...] = ("125M", "350M", "1.3B")
    attentions: tuple[Attention, ...] = ("softmax", "softmax_1")
    ranks: tuple[PositiveInt, ...] = Field(default=(128, 4), min_length=1)
    layers: PositiveInt = 1
    length: PositiveInt = 512
    pretraining: PositiveInt = 40
    tuning: PositiveInt = 10
    ladder: tuple[PositiveInt, ...] = (32, 64, 128)
    families: tuple[Family, ...] = ("svd", "skeleton", "sparse", "polynomial")
    heads: PositiveInt = 3
    sequences: PositiveInt = 2
    timed: PositiveInt = 1024
    stretch: PositiveFloat = 4.0
    repeats: PositiveInt = 9
    max_seconds: PositiveFloat = 30.0
    seed: int = 0


def points(config: Config) -> list[dict[str, Any]]:
    """Features of each model and attention, the time of its step at the first rank, of one head's
    gradient at all.
    """
    out: list[dict[str, Any]] = [
        {"part": "features", "model": model, "attention": attention}
        for model in config.models
        for attention in config.attentions
    ]
    out += [{"part": "step", "model": model, "rank": config.ranks[0]} for model in config.models]
    return out + [{"part": "head", "rank": r} for r in config.ranks]


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """What the part of the point measures."""
    parts = {"head": head_times, "step": step_times, "features": features}
    return parts[point["part"]](point, config)


def methods(config: Config) -> dict[str, Any]:
    """The approximate methods of the config's families by name: "skeleton 32" has width 32,
    "polynomial 2" degree 2.
    """
    import lora_limits as ll

    of = {
        "svd": ll.Svd,
        "skeleton": ll.Skeleton,
        "sparse": lambda k: ll.SparseLowRank(k // 2, k - k // 2),
    }
    out: dict[str, Any] = {
        f"{f} {k}": of[f](k) for f in config.families if f in of for k in config.ladder
    }
    return out | {
        f"polynomial {g}": ll.Polynomial(g) for g in (1, 2) if "polynomial" in config.families
    }


def head_times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Seconds of one head's gradients at `timed` tokens by every method; of inputs as wide as the
    head.
    """
    import jax
    import numpy as np

    import lora_limits as ll
    from lora_limits.instruments import timing
    from lora_limits.problem import NAMES

    rng = np.random.default_rng(config.seed)

    def normal(*shape):
        return jax.numpy.asarray(rng.normal(size=shape), jax.numpy.float32) / shape[-1] ** 0.5

    x = normal(config.timed, WIDTH)
    r = point["rank"]
    weights = ll.AttentionWeights(**{name: normal(WIDTH, WIDTH) for name in NAMES})
    adapters = {name: ll.Adapter(normal(r, WIDTH), normal(WIDTH, r)) for name in NAMES}
    problem = ll.LoRAProblem(
        x, x, x, x, weights=weights, adapters=adapters, scale=SCALE, beta=WIDTH**-0.5
    )
    # the decomposition of f is the limit of every factor and no algorithm: not timed
    tried = {name: method for name, method in methods(config).items() if not name.startswith("svd")}
    tried |= {f"exact {b}": ll.Exact(b) for b in BLOCKS if b <= config.timed} or {
        "exact": ll.Exact()
    }
    calls = {}
    for name, method in tried.items():
        compiled = jax.jit(lambda p, m=method: ll.gradient(p, m).gradient).lower(problem).compile()
        calls[name] = functools.partial(compiled, problem)
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    exact = min(
        (name for name in times if name.startswith("exact")),
        key=lambda name: times[name]["seconds"],
    )
    return {"methods": times, "exact": times[exact]["seconds"]}


def step_times(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Seconds and operations of a LoRA step, exact, by turns: softmax, the same on stretched
    scores, softmax_1.
    """
    import jax
    from flax import nnx

    from experiments.training import loop, tasks
    from lora_limits.instruments import timing
    from lora_limits.instruments.counting import count_operations
    from lora_limits.nn.transformer import Transformer

    task = tasks.load("next_byte", config.timed, "target")
    data = tasks.batch(task.train, 1, config.seed, 0)
    gradient = jax.grad(loop.loss_of, argnums=1)
    run = jax.jit(gradient, static_argnums=0)
    lora = lora_of(point["rank"])
    calls = {}
    operations = {}
    for attention in config.attentions:
        options = sizes(point["model"], attention, config, mlp=4)
        base = loop.Base("next_byte", config.timed, loop.Recipe(1), options=options)
        model = Transformer(base.shape(), lora, rngs=nnx.Rngs(config.seed))
        graphdef, *params = nnx.split(model, loop.ADAPTERS, ...)
        calls[attention] = functools.partial(run, graphdef, *params, *data)
        operations[attention] = count_operations(
            functools.partial(gradient, graphdef), *params, *data
        )["flops"]
        if attention == "softmax":
            calls["stretched"] = functools.partial(
                run, *nnx.split(stretched(model, config.stretch), loop.ADAPTERS, ...), *data
            )
    times = timing.interleaved(calls, repeats=config.repeats, max_seconds=config.max_seconds)
    heads = config.layers * SHAPES[point["model"]][1]
    return {
        "steps": times,
        "operations": operations,
        "sequences": len(task.train.tokens),
        "heads": heads,
    }


def stretched(model: Any, by: float) -> Any:
    """A copy of the model whose W*_Q and W*_K are `by` times as large; the model itself is not
    touched.
    """
    from flax import nnx

    copy = nnx.clone(model)
    for block in copy.blocks:
        for kernel in (block.attention.query.kernel, block.attention.key.kernel):
            kernel[...] = by * kernel[...]
    return copy


def lora_of(rank: int) -> Any:
    """Full LoRA of that rank at the scale of Table 1."""
    from lora_limits.nn.lora import LoRA
    from lora_limits.problem import NAMES

    return LoRA(rank, SCALE * rank, adapt=NAMES)


def sizes(model: str, attention: str, config: Config, mlp: int) -> tuple[tuple[str, Any], ...]:
    """Options of Shape."""
    d_model, heads = SHAPES[model]
    options = {
        "d_model": d_model,
        "heads": heads,
        "width": WIDTH,
        "layers": config.layers,
        "mlp": mlp * d_model,
    }
    return tuple(sorted((options | {"softmax_1": attention == "softmax_1"}).items()))


def features(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms and outliers of a pretrained and tuned model, and the error of every method on its
    heads, by rank.
    """
    from experiments.training import loop, tasks

    options = sizes(point["model"], point["attention"], config, mlp=1)
    recipe = loop.Recipe(config.pretraining, batch=1, rate=1e-3, every=config.pretraining, tests=2)
    base = loop.Base("next_byte", config.length, recipe, options=options)
    task = tasks.load("next_byte", config.length, "target")
    out: dict[str, Any] = {"errors": {}}
    for rank in config.ranks:
        model = loop.pretrained(base, lora_of(rank), BASES, seed=config.seed)
        tuning = loop.Recipe(config.tuning, batch=1, rate=1e-3, every=config.tuning, tests=2)
        history = loop.train(model, task, tuning)
        found, problems = look(
            model, tasks.Data(*(x[: config.sequences] for x in task.test)), config
        )
        out["errors"][str(rank)] = errors(problems, config)
        if rank == config.ranks[0]:
            out |= found | {"loss": history["test_loss"][-1]}
    return out


def look(model: Any, data: Any, config: Config) -> tuple[dict[str, Any], list[Any]]:
    """(norms and outliers, the problems of some heads of every layer on the first sequence)."""
    import jax
    import numpy as np
    from flax import nnx

    from experiments.training import loop
    from lora_limits.instruments.compiling import quick_jit
    from lora_limits.nn import per_layer

    graphdef, params = nnx.split(model)

    @quick_jit
    def run(params, tokens, labels):
        model = nnx.merge(graphdef, params)
        read, cotangents = per_layer.cotangents(
            model, tokens, lambda logits: loop.loss(logits, labels)
        )
        written = [block.attention(x) for block, x in zip(model.blocks, read, strict=True)]
        heads = [
            per_layer.problem_of(b.attention, x[0]) for b, x in zip(model.blocks, read, strict=True)
        ]
        return per_layer.norms(model, tokens), written, heads, [c[0] for c in cotangents]

    reports, written, heads, cotangents = jax.tree.map(np.asarray, run(params, *data))
    activations = np.stack(written).astype(float)
    centred = activations - activations.mean()
    variance = (centred**2).mean()
    pick = np.unique(np.linspace(0, model.shape.heads - 1, config.heads).round().astype(int))
    problems = [
        block_problem(jax.tree.map(lambda z, n=n: z[n], stacked), cotangent[:, n])
        for stacked, cotangent in zip(heads, cotangents, strict=True)
        for n in pick
    ]
    found = {
        "gamma": [np.asarray(report.gamma_ratio).ravel().tolist() for report in reports],
        "score": [np.asarray(report.score_ratio).ravel().tolist() for report in reports],
        "largest": float(np.abs(activations).max()),
        "kurtosis": float((centred**4).mean() / variance**2),
    }
    return found, problems


def block_problem(problem: Any, cotangent: Any) -> Any:
    """The second half's queries on the keys of the first half and one more, which all of them see:
    no mask is needed.

    Of softmax_1 the one more is its key of zeros. Tokens are turned to coordinates of their own
    span, which turns
    dl/dB and changes no norm: one shape for all models. The residual is the head's own cotangent,
    scaled to the size
    of its output.
    """
    import numpy as np

    import lora_limits as ll
    from lora_limits.ledger.row import softmax
    from lora_limits.problem import NAMES

    half = problem.x_query.shape[0] // 2
    x, keys = (np.asarray(z, float) for z in (problem.x_query[half:], problem.x_key[: half + 1]))
    span = np.linalg.qr(np.concatenate([x, keys]).T)[0]
    x = x @ span
    keys = keys @ span
    scale = float(problem.scale)
    beta = float(problem.beta)
    weights = {}
    adapters = {}
    rows = {}
    for name, z in zip(NAMES, (x, keys, keys), strict=True):
        weights[name] = span.T @ np.asarray(getattr(problem.weights, name), float)
        a, b = (np.asarray(z, float) for z in (problem.adapters[name].a, problem.adapters[name].b))
        adapters[name] = ll.Adapter(a, span.T @ b)
        rows[name] = z @ (weights[name] + scale * adapters[name].b @ adapters[name].a)
    out = softmax(beta * rows["query"] @ rows["key"].T) @ rows["value"]
    c = np.asarray(cotangent[half:], float)
    target = out - c * np.linalg.norm(out) / np.linalg.norm(c)
    x, keys, target, weights, adapters, scale, beta = _float32(
        x, keys, target, weights, adapters, scale, beta
    )
    return ll.LoRAProblem(
        x,
        keys,
        keys,
        target,
        weights=ll.AttentionWeights(**weights),
        adapters=adapters,
        scale=scale,
        beta=beta,
    )


def _float32(*trees: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), trees)


@functools.cache
def _gradient(method: Any) -> Callable[[Any], Any]:
    import lora_limits as ll
    from lora_limits.instruments.compiling import quick_jit

    return quick_jit(lambda problem: ll.gradient(problem, method).gradient)


def errors(problems: list[Any], config: Config) -> dict[str, list[float]]:
    """Of every method on every problem: the relative Frobenius error of A and B, the worst of the
    projections.
    """
    import jax
    import numpy as np

    import lora_limits as ll

    def flat(problem, method):
        found = _gradient(method)(problem)
        return {
            n: np.concatenate([np.ravel(z) for z in jax.tree.leaves(g)]).astype(float)
            for n, g in found.items()
        }

    tried = methods(config)
    out: dict[str, list[float]] = {name: [] for name in tried}
    for problem in problems:
        want = flat(problem, ll.Exact())
        for name, method in tried.items():
            got = flat(problem, method)
            out[name].append(
                max(float(np.linalg.norm(got[n] - w) / np.linalg.norm(w)) for n, w in want.items())
            )
    return out
