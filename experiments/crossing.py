"""Remark 5.2 along training: when fine-tuning carries a layer over the boundary, and what holds its
norms back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from experiments.runner.config import Fields

VERSION = 1
SHARED = (
    "length",
    "pretraining",
    "steps",
    "every",
    "batch",
    "sequences",
    "shrink",
    "decay",
    "degrees",
    "seed",
)
X64 = True
BASES = Path("results/bases")
WIDTH = 8
Case = Literal["plain", "alpha/sqrt(r)", "query-key norm", "weight decay", "as pretrained"]


class Config(Fields):
    """Fine-tuning of a small classifier, all three projections adapted, Adam at a constant rate;
    beta = 1/sqrt(8).

    Runs: one of rates, ranks and alphas at a time, the others at their middle one; alpha/sqrt(r) at
    every rank above
    1; the other cases at the largest rate. shrink: of W*_Q and W*_K, so that runs start below the
    boundary; not applied "as pretrained". decay: decoupled, of the adapters. Norms and certificates
    are of `sequences` held-out sequences.
    """

    rates: tuple[PositiveFloat, ...] = Field(min_length=1)
    ranks: tuple[PositiveInt, ...] = Field(min_length=1)
    alphas: tuple[PositiveFloat, ...] = Field(min_length=1)
    cases: tuple[Case, ...] = ("alpha/sqrt(r)", "query-key norm", "weight decay", "as pretrained")
    length: PositiveInt = 128
    pretraining: PositiveInt = 150
    steps: PositiveInt = 120
    every: PositiveInt = 10
    batch: PositiveInt = 16
    sequences: PositiveInt = 2
    shrink: PositiveFloat = 0.4
    decay: PositiveFloat = 3.0
    degrees: tuple[PositiveInt, ...] = (2, 4)
    seed: int = 0


def points(config: Config) -> list[dict[str, Any]]:
    """One point a run."""
    middle = {
        "rate": config.rates[len(config.rates) // 2],
        "rank": config.ranks[len(config.ranks) // 2],
        "alpha": config.alphas[len(config.alphas) // 2],
        "case": "plain",
    }
    runs = [middle]
    for name, values in (("rate", config.rates), ("rank", config.ranks), ("alpha", config.alphas)):
        runs += [middle | {name: value} for value in values if value != middle[name]]
    for case in config.cases:
        if case == "alpha/sqrt(r)":
            runs += [middle | {"rank": rank, "case": case} for rank in config.ranks if rank > 1]
        else:
            runs.append(middle | {"rate": max(config.rates), "case": case})
    return runs


def measure(point: dict[str, Any], config: Config) -> dict[str, Any]:
    """Norms and certificates of each layer along the run, the steps at which it crosses, and what
    was learnt.
    """
    from experiments.training import loop, tasks

    model = start(point, config)
    task = tasks.load("which_module", config.length, "target")
    recipe = loop.Recipe(config.steps, batch=config.batch)
    before = loop.evaluate(model, task.test, recipe)
    look = watcher(model, tasks.Data(*(x[: config.sequences] for x in task.test)), config.degrees)
    seen: list[list[dict[str, Any]]] = []
    steps = run(model, task, point, config, lambda: seen.append(look()))
    layers = []
    for rows in zip(*seen, strict=True):
        layer = {name: [row[name] for row in rows] for name in rows[0]}
        crossed = {
            name: next((n for n, x in zip(steps, layer[name], strict=True) if x >= 1), None)
            for name in NORMS
        }
        layers.append(layer | {"crossed": crossed})
    return {
        "steps": steps,
        "layers": layers,
        "before": before,
        "after": loop.evaluate(model, task.test, recipe),
    }


NORMS = ("gamma", "score")


def start(point: dict[str, Any], config: Config) -> Any:
    """The pretrained base with fresh adapters; its query and key weights shrunk, but for "as
    pretrained".

    Query-key normalisation undoes the shrinking: its base starts where it was.
    """
    from experiments.training.loop import Base, Recipe, pretrained
    from lora_limits.nn.lora import LoRA
    from lora_limits.problem import NAMES

    case = point["case"]
    scaling = case if case == "alpha/sqrt(r)" else "alpha/r"
    options = (
        ("d_model", 32),
        ("heads", 4),
        ("normalised", case == "query-key norm"),
        ("width", WIDTH),
    )
    base = Base(
        "which_module",
        config.length,
        Recipe(config.pretraining, every=config.pretraining),
        options=options,
    )
    lora = LoRA(point["rank"], point["alpha"], scaling, adapt=NAMES)
    model = pretrained(base, lora, BASES, seed=config.seed)
    if case != "as pretrained":
        for block in model.blocks:
            for name in ("query", "key"):
                kernel = getattr(block.attention, name).kernel
                kernel[...] = config.shrink * kernel[...]
    return model


def run(
    model: Any, task: Any, point: dict[str, Any], config: Config, look: Callable[[], None]
) -> list[int]:
    """Train the adapters in place, Adam with clipped gradients; look at every `every` steps.
    Returns those steps.
    """
    import jax
    import optax
    from flax import nnx

    from experiments.training import loop, tasks

    decay = config.decay if point["case"] == "weight decay" else 0.0
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(point["rate"], weight_decay=decay)
    )
    graphdef, trained, frozen = nnx.split(model, loop.ADAPTERS, ...)
    state = optimiser.init(trained)

    @jax.jit
    def step(trained, state, tokens, labels):
        grads = jax.grad(loop.loss_of, argnums=1)(graphdef, trained, frozen, tokens, labels)
        updates, state = optimiser.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    steps = []
    for n in range(config.steps + 1):
        if n % config.every == 0 or n == config.steps:
            nnx.update(model, trained)
            steps.append(n)
            look()
        if n < config.steps:
            trained, state = step(
                trained, state, *tasks.batch(task.train, config.batch, config.seed, n)
            )
    return steps


def watcher(model: Any, data: Any, degrees: tuple[int, ...]) -> Callable[[], list[dict[str, Any]]]:
    """A function that says what `inspect` measures of each layer as it is, over its heads and the
    sequences.

    Norms: the largest. Certificates of each degree: medians, and the smallest normaliser.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from experiments.training import loop
    from lora_limits.instruments.compiling import quick_jit
    from lora_limits.nn import per_layer

    graphdef = nnx.split(model)[0]

    @quick_jit
    def problems(params, tokens, labels):
        wide = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64), params))
        read, cotangents = per_layer.cotangents(
            wide, tokens, lambda logits: loop.loss(logits, labels)
        )
        make = normalised_problem if wide.shape.normalised else adapted_problem
        return [
            jax.vmap(functools.partial(make, block.attention))(x, c)
            for block, x, c in zip(wide.blocks, read, cotangents, strict=True)
        ]

    def look():
        out = []
        for problem in problems(nnx.split(model)[1], *data):
            found = jax.tree.map(np.asarray, _judge(degrees)(problem))
            row = {name: float(found[name].max()) for name in (*NORMS, "update")}
            row["median score"] = float(np.median(found["score"]))
            for g in degrees:
                row |= {
                    f"{name} {g}": float(np.median(found[f"{name} {g}"]))
                    for name in ("bound", "error")
                }
                row[f"normaliser {g}"] = float(found[f"normaliser {g}"].min())
            out.append(row)
        return out

    return look


@functools.cache
def _judge(degrees: tuple[int, ...]) -> Callable[[Any], dict[str, Any]]:
    """`inspect` over (sequences, heads), compiled once for each rank."""
    import jax

    from lora_limits.instruments.compiling import quick_jit

    return quick_jit(jax.vmap(jax.vmap(lambda problem: inspect(problem, degrees))))


def adapted_problem(layer: Any, x: Any, cotangent: Any) -> Any:
    """The layer's heads on one sequence with a residual that has the size of their outputs, as it
    has for Y = 0.
    """
    from lora_limits.nn import per_layer

    return per_layer.problem_of(layer, x, sized(layer, x, cotangent))


def normalised_problem(layer: Any, x: Any, cotangent: Any) -> Any:
    """The same where no W gives the scores: adapters of the normalised rows of Q and K, and of V,
    at A = 0, B = 1.
    """
    import jax
    import jax.numpy as jnp

    import lora_limits as ll
    from lora_limits.nn import per_layer
    from lora_limits.problem import NAMES

    def head(q, k, v, target):
        eye = jnp.eye(WIDTH, dtype=q.dtype)
        weights = ll.AttentionWeights(query=eye, key=eye, value=eye)
        adapters = {name: ll.Adapter(jnp.zeros_like(eye), eye) for name in NAMES}
        scale, beta = (jnp.asarray(value, q.dtype) for value in (1.0, WIDTH**-0.5))
        return ll.LoRAProblem(
            q, k, v, target, weights=weights, adapters=adapters, scale=scale, beta=beta
        )

    target = layer.attend(x[None], per_layer.EXACT)[0] - sized(layer, x, cotangent)
    q, k, v = (rows[0] for rows in layer.rows(x[None]))
    return jax.vmap(head, 1)(q, k, v, target)


def sized(layer: Any, x: Any, cotangent: Any) -> Any:
    """The cotangent (L, heads, width) of each head scaled to the Frobenius norm of its output."""
    import jax.numpy as jnp

    from lora_limits.nn import per_layer

    out = layer.attend(x[None], per_layer.EXACT)[0]
    size, own = (jnp.sqrt((z**2).sum((0, 2), keepdims=True)) for z in (out, cotangent))
    return cotangent * size / jnp.where(own > 0, own, 1)


def inspect(problem: Any, degrees: tuple[int, ...]) -> dict[str, Any]:
    """Gamma / sqrt(ln L), R / ln L, the adapters' share, and for each degree bound, error and
    normaliser.

    Bounds and errors are relative to the max norm of the exact array, the worst of the arrays whose
    gradient is not 0.
    """
    import jax
    import jax.numpy as jnp

    import lora_limits as ll

    report = ll.norm_report(problem)
    update = jnp.maximum(report.query_update, report.key_update)
    out = {"gamma": report.gamma_ratio, "score": report.score_ratio, "update": update}
    exact = jax.tree.leaves(ll.gradient(problem, ll.Exact()).gradient)
    sizes = jnp.stack([jnp.abs(x).max() for x in exact])

    def worst(values):
        return jnp.where(sizes > 0, jnp.stack(values) / jnp.where(sizes > 0, sizes, 1), 0).max()

    for g in degrees:
        result = ll.gradient(problem, ll.Polynomial(g))
        pairs = zip(jax.tree.leaves(result.gradient), exact, strict=True)
        out[f"bound {g}"] = worst(jax.tree.leaves(result.bound))
        out[f"error {g}"] = worst([jnp.abs(a - b).max() for a, b in pairs])
        out[f"normaliser {g}"] = jnp.asarray(result.normaliser)
    return out
