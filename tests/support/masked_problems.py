"""Problems with what models put into attention: every field alone, in combinations, without numbers,
and with anything in the tokens that do not count.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.problem import replaced

L = 13
SELF = dataclasses.replace(problems.SELF, width=4, rank=1)
FIELDS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "rotations": {"rotations": ll.rotary_angles(L, 4, base=3.0)},
    "partial rotations": {"rotations": ll.rotary_angles(L, 2, base=3.0)},
    "query_mask": {"query_mask": np.arange(L) % 5 != 3},
    "key_mask": {"key_mask": np.arange(L) % 4 != 0},
    "segments": {"segments": np.array([7] * 5 + [2] * 1 + [7] * 4 + [0] * 3)},
}


def having(*names, seed=1, **options):
    """A problem of self-attention with these of FIELDS."""
    options = {"shape": SELF, "reach": 2.0} | options
    fields = {k: v for name in names for k, v in FIELDS[name].items()}
    p = problems.make(seed, **options)
    dtype = p.x_query.dtype
    if "rotations" in fields:
        fields["rotations"] = fields["rotations"].astype(dtype)
    return dataclasses.replace(p, **fields)


def combinations():
    """Every set of fields, the two kinds of rotations and the causal order with a window apart."""
    orders = ((), ("causal",), ("causal", "window"))
    turns = ((), ("rotations",), ("partial rotations",))
    rest = ("query_mask", "key_mask", "segments")
    subsets = [c for n in range(len(rest) + 1) for c in itertools.combinations(rest, n)]
    return [a + b + c for a in orders for b in turns for c in subsets]


def filled(p):
    """The same problem with every array field given: one program then serves all combinations."""
    n = len(p.x_query)
    neutral = {
        "rotations": np.zeros((n, 2), p.x_query.dtype),
        "query_mask": np.ones(n, bool),
        "key_mask": np.ones(n, bool),
        "segments": np.zeros(n, int),
    }
    missing = {name: x for name, x in neutral.items() if getattr(p, name) is None}
    angles = p.rotations
    if angles is not None and angles.query.shape[1] < 2:
        # partial rotations of n pairs turn other pairs than full ones: no filling makes them alike
        raise ValueError("partial rotations cannot be filled")
    return dataclasses.replace(p, **missing)


def abstract(length, **fields):
    """A causal problem of `length` tokens without numbers in it."""
    shape = problems.Shape(lq=4, lk=4, inputs=(16, 16, 16), width=8, value_width=8, rank=2)
    p = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            tuple(length if n == 4 else n for n in np.shape(x)), np.float64
        ),
        problems.make(0, shape=shape),
    )
    return replaced(p, **fields)


def spoiled(p, value, queries, keys):
    """The problem with `value` in the tokens that these masks mark, unchecked, as under jit."""

    def put(x, where):
        return jnp.where(jnp.asarray(where)[:, None], value, x)

    return replaced(
        p,
        x_query=put(p.x_query, queries),
        target=put(p.target, queries),
        x_key=put(p.x_key, keys),
        x_value=put(p.x_value, keys),
    )


def assert_untouched(run, p, queries, keys):
    """Bit for bit the same with anything in tokens that do not count."""
    want = jax.tree.leaves(run(p))
    for value in (3.0, 1e300, np.inf, np.nan):
        got = jax.tree.leaves(run(spoiled(p, value, queries, keys)))
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True)), value
