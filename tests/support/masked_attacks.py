"""Problems to try the promises on: the kinds, twists and targets of experiments/attacks/families.py with
an order, rotations and masks.
"""

import dataclasses

import jax
import numpy as np

import lora_limits as ll
from experiments.attacks.families import draw as draw_plain
from experiments.attacks.tally import ratios
from experiments.problems import conditioned
from lora_limits.instruments.compiling import quick_jit
from tests.support import masked_extended

SHAPES = tuple(
    conditioned.Shape(lq=n, lk=n, inputs=(i, i, i), width=d, value_width=v, rank=r)
    for n, i, d, v, r in ((1, 2, 2, 1, 1), (13, 4, 2, 2, 2), (24, 3, 4, 1, 1), (40, 5, 3, 4, 2))
)
STRUCTURES = (
    ("causal",),
    ("causal", "rotations"),
    ("causal", "rotations", "masks"),
    ("one angle", "masks"),
    ("rotations", "masks"),
    ("causal", "rotations", "segments"),
    ("segments", "masks"),
)


def structured(rng, p, names):
    """The problem with an order, rotations, masks, segments. A target near the output stays near it."""
    n, d = len(p.x_query), p.weights.query.shape[1]
    fields = {"causal": "causal" in names}
    if "rotations" in names or "one angle" in names:
        half = d // 2 if "rotations" in names else 1
        angles = rng.uniform(-1, 1, (n, half)) * 10.0 ** rng.uniform(-3, 4)
        fields["rotations"] = angles.astype(p.x_query.dtype)
    if "masks" in names:
        fields["query_mask"] = rng.random(n) < rng.uniform(0.1, 1.1)
        fields["key_mask"] = rng.random(n) < rng.uniform(0.3, 1.1)
    if "segments" in names:
        fields["segments"] = np.sort(rng.integers(3, size=n)).astype(np.int32)
    return dataclasses.replace(p, **fields)


def draw(rng, shape, adapt, names, dtype=np.float64, powers=(-6, 1.2)):
    """(problem, its family)."""
    p, family = draw_plain(rng, shape, adapt, dtype, powers)
    with np.errstate(all="ignore"):
        p = structured(rng, p, names)
        if family.endswith("late in training"):
            out = masked_extended.output(p)
            noise = 10.0 ** rng.uniform(-16, -4) * np.abs(out).max() * rng.normal(size=out.shape)
            p = dataclasses.replace(p, target=(out + noise).astype(dtype))
    return p, f"{family}, {'+'.join(names)}"


def method_of(rng, names):
    degree = int(rng.integers(7))
    if "segments" in names or "causal" in names:
        # an odd one has blocks of 128 at least, in which all is exact here
        degree -= degree % 2
    # blocks of the default size hold all of these tokens
    centred, block = bool(rng.random() < 0.8), (1, 2, 3, 5, 7, None)[rng.integers(6)]
    return ll.Polynomial(degree, centred=centred, block_size=block)


def attack(count, seed, dtype=np.float64, names=None, method=None, rows=16):
    """[(promise, error over it, whether finite, description)] of `count` problems of one shape,
    structure and method, drawn at random where not given. rows None: of the certified bound alone.
    """
    rng = np.random.default_rng(seed)
    shape = SHAPES[rng.integers(len(SHAPES))]
    adapt = conditioned.SUBSETS[rng.integers(len(conditioned.SUBSETS))]
    names = names or STRUCTURES[rng.integers(len(STRUCTURES))]
    method = method or method_of(rng, names)
    drawn = (draw(rng, shape, adapt, names, dtype) for _ in range(count))
    many, families_of = zip(*drawn, strict=True)
    batch = conditioned.stack(many)

    def solve(p, key):
        options = {} if rows is None else {"rows": rows, "key": key}
        result = ll.gradient(p, method, **options)
        # what is not asked for is not compiled
        return dataclasses.replace(result, estimate=None)

    keys = jax.random.split(jax.random.key(seed), count)
    result = jax.tree.map(np.asarray, quick_jit(jax.vmap(solve))(batch, keys))
    with np.errstate(all="ignore"):
        want = masked_extended.gradients(batch)
    out = []
    for promise in ("bound",) if rows is None else ("bound", "confident"):
        held = dataclasses.replace(result, bound=getattr(result, promise))
        for ratio, finite, family in zip(*ratios(held, want), families_of, strict=True):
            say = f"{family}, {method}, {shape}, {adapt}"
            out.append((promise, float(ratio), bool(finite), say))
    return out
