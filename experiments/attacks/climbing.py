"""Hill climbing on error / bound: the worst of the problems seen so far, changed again and again."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from experiments.attacks.families import SHAPES, compiled, draw, method_of, output, with_target
from experiments.attacks.tally import Tally, ratios
from experiments.problems import conditioned, extended


def mutated(rng, problem, step):
    """Entries moved, arrays scaled, tokens copied, offsets added, targets drawn to the output."""

    def change(v):
        v = np.asarray(v)
        if v.ndim == 0 or rng.random() < 0.4:
            return v
        how = rng.integers(7)
        if how == 0:
            return v * (1 + step * rng.normal(size=v.shape))
        if how == 1:
            new = v + step * np.abs(v).max() * rng.normal(size=v.shape)
            return np.where(rng.random(v.shape) < 0.7, v, new)
        if how == 2:
            return v * 10 ** (step * rng.normal())
        if how == 3:
            return v + step * np.abs(v).max() * rng.normal(size=v.shape[1])
        new = v.copy()
        i, j = rng.integers(len(v), size=2)
        if how == 4:
            new[i] = v[j]
        elif how == 5:
            new[i] = v[i] * 10 ** rng.normal()
        else:
            new[i] = -v[i]
        return new

    out = jax.tree.map(lambda v: np.asarray(change(v), np.asarray(v).dtype), problem)
    if rng.random() < 0.1:
        with np.errstate(all="ignore"):
            near = output(out)
        near = near + step * 10.0 ** rng.uniform(-10, 0) * np.abs(near).max() * rng.normal(
            size=near.shape
        )
        if np.isfinite(near.astype(out.target.dtype)).all():
            out = with_target(out, near.astype(out.target.dtype))
    return out


def climb(method, shape, adapt, generations, seed=0, dtype=np.float64, pool=48, powers=(-6, 1.2)):
    """One climb, of `pool` problems a generation."""
    rng = np.random.default_rng(seed)
    run = compiled(method)
    tally = Tally()
    parents = [draw(rng, shape, adapt, dtype, powers)[0] for _ in range(pool)]
    scores = np.full(pool, -1.0)
    children = parents
    for _ in range(generations):
        stacked = conditioned.stack(children)
        with np.errstate(all="ignore"):
            worst, finite = ratios(
                jax.tree.map(np.asarray, run(stacked)), extended.gradients(stacked)
            )
        for i in range(len(children)):
            tally.add(worst[i], finite[i], f"{method}, {shape}, {adapt}")
        everyone = [*parents, *children] if scores[0] >= 0 else list(children)
        scores = np.concatenate([scores, worst]) if scores[0] >= 0 else worst
        order = np.argsort(-scores, kind="stable")[: pool // 3]
        parents, scores = [everyone[i] for i in order], scores[order]
        step = 10 ** rng.uniform(-3, 0.3)
        children = [
            mutated(rng, parents[rng.integers(len(parents))], step) for _ in range(pool - 4)
        ]
        children += [draw(rng, shape, adapt, dtype, powers)[0] for _ in range(4)]
    return tally


def hill_climb(count, seed=0, dtype=np.float64, generations=40):
    """`count` climbs, each of a method, a shape and a set of adapters of its own.

    Every second one starts where rounding is all there is: at a high degree and small scores.
    """
    rng = np.random.default_rng(seed)
    tallies = {}
    for i in range(count):
        shape = SHAPES[rng.integers(len(SHAPES) - 1)]
        adapt = conditioned.SUBSETS[rng.integers(len(conditioned.SUBSETS))]
        method = method_of(rng)
        powers = (-6, 1.2)
        if i % 2:
            method, powers = dataclasses.replace(method, degree=8, series="taylor"), (-6, -2)
        tally = climb(method, shape, adapt, generations, seed + i, dtype, powers=powers)
        jax.clear_caches()
        tallies[f"{i}: {method.series} {method.degree} {'+'.join(adapt)}"] = tally
    return tallies
